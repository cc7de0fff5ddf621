"""The ascent in 16-bit models: its norm and step against float64, and what rounding takes of it."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_batch, tiny_model

from lfu import LfUStep
from lfu.training.advice import WINDOW, Advice
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


# name -> (model, autocast's dtype)
MODELS = {
    "bf16": (lambda: model_of(torch.bfloat16), None),
    "bf16 with a float32 adapter": (adapter_in_float32, None),
    "float32 under bf16 autocast": (lambda: model_of(torch.float32), torch.bfloat16),
    "float32 under fp16 autocast": (lambda: model_of(torch.float32), torch.float16),
}


def step_of(model, kind: str, **options) -> tuple[LfUStep, list[torch.Tensor]]:
    """A step, and a list that its ascent gradient is put into: the direction that it moves in."""
    step, seen = LfUStep(model, auxiliary=kind, **options), []
    take = step.auxiliary.take_gradients

    def take_and_note():
        gradients = take()
        seen.append(torch.cat([g.flatten().double() for g in gradients if g is not None]))
        return gradients

    step.auxiliary.take_gradients = take_and_note
    return step, seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_norm_direction_and_step_are_those_of_float64_to_the_models_precision(name, kind, monkeypatch):
    """bf16 keeps 8 bits: sums of thousands of products agree to a few per cent.

    The whole step under autocast, too, whose cache of cast weights must not outlive a move of `own`.
    """
    # A in the float64 model as in the others: from one seed float64 draws other numbers than float32
    monkeypatch.setattr("lfu.undesirable.lora.component_dtype", lambda dtype: torch.float32)
    make, mixed = MODELS[name]
    autocast = lambda: torch.autocast("cpu", dtype=mixed, enabled=mixed is not None)
    wanted, right = step_of(model_of(torch.float64, "lora" if "adapter" in name else "full"), kind)
    exact = wanted(tiny_batch())
    with autocast():
        step, found = step_of(make(), kind, autocast=autocast)
        record = step(tiny_batch())
    assert record.skipped is None
    assert float(torch.cosine_similarity(found[0], right[0], dim=0)) > 0.99
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
