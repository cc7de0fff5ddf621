"""The ascent in 16-bit models: its norm and step against float64, and what rounding takes of it."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_batch, tiny_model

from lfu import LfUStep
from lfu.advice import WINDOW, Advice
from lfu.undesirable import KINDS

WIDE = dict(hidden_size=64, head_dim=16)


def model_of(dtype: torch.dtype, theta: str = "full"):
    """The same numbers in every dtype: those that bfloat16 can hold."""
    return tiny_model("llama", theta=theta, dtype=torch.bfloat16, **WIDE).to(dtype)


def adapter_in_float32():
    model = model_of(torch.bfloat16, "lora")
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return model


MODELS = {
    "bf16": (lambda: model_of(torch.bfloat16), False),
    "bf16 with a float32 adapter": (adapter_in_float32, False),
    "float32 under bf16 autocast": (lambda: model_of(torch.float32), True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_norm_and_step_are_those_of_float64_to_the_models_precision(name, kind):
    """bf16 keeps 8 bits: sums of thousands of products agree to a few per cent.

    The whole step under autocast, too, whose cache of cast weights must not outlive a move of `own`.
    """
    make, mixed = MODELS[name]
    autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed)
    # a float64 A is another draw than a float32 one
    dtype = torch.float32 if kind == "lora" else torch.float64
    exact = LfUStep(model_of(dtype, "lora" if "adapter" in name else "full"), auxiliary=kind)(tiny_batch())
    with autocast():
        record = LfUStep(make(), auxiliary=kind, autocast=autocast)(tiny_batch())
    assert record.skipped is None
    assert record.ascent_grad_norm == pytest.approx(exact.ascent_grad_norm, rel=0.05)
    for layer, moved in exact.displacement.items():
        assert record.displacement[layer] == pytest.approx(moved, rel=0.3), layer


@pytest.mark.parametrize("kind", ["lora", "steering"])
def test_components_are_float32_whatever_the_model_is(kind):
    step = LfUStep(model_of(torch.bfloat16), auxiliary=kind)
    step.auxiliary.reset(lambda device: torch.Generator(device).manual_seed(0))
    assert {p.dtype for p in step.auxiliary.parameters()} == {torch.float32}


@pytest.mark.parametrize(("alpha", "told"), [(1e-5, True), (10.0, False)])
def test_own_says_what_bf16_weights_round_away(alpha, told):
    record = LfUStep(model_of(torch.bfloat16), auxiliary="own", alpha=alpha, lam=1e-3)(tiny_batch())
    assert (record.rounded > 0.9) == told
    messages: list[str] = []
    advice = Advice(alpha, 1e-3, warn=messages.append)
    for _ in range(WINDOW):
        advice.watch(record)
    assert any("lost in rounding" in message for message in messages) == told


def test_wide_weights_lose_nothing():
    assert LfUStep(model_of(torch.float32), auxiliary="own", alpha=1e-5)(tiny_batch()).rounded == 0
