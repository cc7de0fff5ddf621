"""The parts of a model: layer ranges, and models that have no such parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

from lfu import LfUStep
from lfu.model.anatomy import anatomy, layer_range


@given(st.integers(1, 80))
def test_thirds_cover_every_layer_once(depth):
    if depth < 3:
        return
    thirds = [layer_range(name, depth) for name in ("early", "middle", "late")]
    assert [layer for third in thirds for layer in third] == layer_range("all", depth) == list(range(1, depth + 1))
    if depth == 32:
        assert [(t[0], t[-1]) for t in thirds] == [(1, 11), (12, 22), (23, 32)]


def test_models_it_cannot_work_with():
    import transformers

    t5 = transformers.T5Config(vocab_size=32, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8)
    with pytest.raises(ValueError, match="encoder-decoder"):
        LfUStep(transformers.T5ForConditionalGeneration(t5))
    with pytest.raises(ValueError, match="not a transformers model"):
        LfUStep(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no language-model head"):
        LfUStep(tiny_model("llama").model)
    bare = tiny_model("llama")
    for block in bare.model.layers:
        block.self_attn, block.mlp = torch.nn.Identity(), torch.nn.Identity()
    with pytest.raises(ValueError, match="no linear layer"):
        LfUStep(bare)


@pytest.mark.parametrize("theta", ["full", "lora"])
def test_a_compiled_model_is_refused_and_compiled_parts_without_hooks_are_not(theta):
    model = tiny_model("llama", theta=theta)
    blocks = anatomy(model).blocks
    blocks[0].mlp.act_fn.compile(backend="eager")
    LfUStep(model)
    with pytest.raises(ValueError, match=r"the model is compiled: .* before torch.compile"):
        LfUStep(torch.compile(model, backend="eager"))
    blocks[1].compile(backend="eager")
    with pytest.raises(ValueError, match=r"the module '.*layers\.1' is compiled"):
        LfUStep(model)
