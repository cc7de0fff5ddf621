"""OFT: what PEFT's adapter promises, and what is refused."""

from __future__ import annotations

import pytest
import torch
from bench import logits, small_model, tiny_trainer
from peft import LoraConfig, OFTConfig

LORA = LoraConfig(r=2, target_modules="all-linear")


@pytest.mark.parametrize("method", ["oft", "oft+kl", "lfu+oft", "oft+l2sp"])
def test_it_starts_as_the_untouched_model_and_keeps_the_weights_lengths(tmp_path, method):
    untouched = small_model(dtype=torch.float32)
    lengths = {n: p.detach().norm() for n, p in untouched.named_parameters() if "proj" in n}
    before = logits(untouched)
    knobs = {"oft.block": 8, **({"l2sp.weight": 0.1} if "l2sp" in method else {})}
    t = tiny_trainer(method, tmp_path, dtype=torch.float32, peft_config=LORA, method_args=knobs, learning_rate=1e-3)
    assert isinstance(t.model.active_peft_config, OFTConfig)
    torch.testing.assert_close(logits(t.model), before, rtol=1e-4, atol=1e-5)
    t.train()
    assert not torch.allclose(logits(t.model), before, rtol=1e-4, atol=1e-5)
    tuned = t.model.merge_and_unload()
    for name, length in lengths.items():
        torch.testing.assert_close(tuned.get_parameter(name).detach().norm(), length, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"peft_config": None}, "starts an adapter: train one"),
        (
            {"peft_config": OFTConfig(target_modules=["q_proj"])},
            "settings of a LoRA adapter, got OFTConfig",
        ),
        (
            {"peft_config": LoraConfig(target_modules=["q_proj"], use_dora=True)},
            "with use_dora=True: drop it",
        ),
        ({"theta": "lora"}, "the model is an adapter already: merge it first"),
    ],
)
def test_what_is_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=f"method 'oft'.*{said}"):
        tiny_trainer("oft", tmp_path, dtype=torch.float32, **options)
