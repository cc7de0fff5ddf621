"""The two gradients of theta kept apart, measured whole or on a sample; what is not finite never stays."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DEVICE, gradients, relative_difference, tiny_batch, tiny_model

from lfu import LfUStep
from lfu.step.gradients import sample_of
from lfu.step.step import sft_loss


@pytest.mark.parametrize("kind", ["lora", "steering", "own"])
def test_non_finite_loss_leaves_earlier_gradients(kind):
    model = tiny_model("llama", dtype=torch.float32)
    step = LfUStep(model, auxiliary=kind)
    step(tiny_batch())
    earlier = gradients(model)
    broken = LfUStep(model, auxiliary=kind, loss_fn=lambda m, b, n: sft_loss(m, b, n) * float("inf"))
    record = broken(tiny_batch(1))
    assert record.skipped == "non-finite loss"
    assert relative_difference(gradients(model), earlier) == 0


@pytest.mark.parametrize("where", [1, 2])
@pytest.mark.parametrize("kind", ["lora", "steering", "own"])
def test_non_finite_gradients_never_stay(kind, where):
    """A finite loss whose clean (1) or perturbed (2) backward overflows."""
    model = tiny_model("llama", dtype=torch.float32)
    calls = 0

    def backward(loss):
        nonlocal calls
        calls += 1
        (loss * (float("inf") if calls == where else 1.0)).backward()

    record = LfUStep(model, auxiliary=kind, backward=backward)(tiny_batch())
    assert record.skipped.startswith("non-finite")
    assert all(torch.isfinite(g).all() for g in gradients(model).values())
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("limit", [10**9, 300], ids=["all measured", "sampled"])
@pytest.mark.parametrize("where", [1, 2])
def test_a_non_finite_tensor_outside_the_sample_never_stays(monkeypatch, where, limit):
    """One weight's gradient overflows in one backward; measured tensors keep what earlier micro-batches gave."""
    monkeypatch.setattr("lfu.step.gradients.WHOLE", limit)
    model = tiny_model("llama", dtype=torch.float32)
    LfUStep(model)(tiny_batch())
    earlier = gradients(model)
    calls = 0
    victim = "model.layers.0.mlp.up_proj.weight"

    def backward(loss):
        nonlocal calls
        calls += 1
        handle = model.get_parameter(victim).register_hook(lambda g: g * float("nan")) if calls == where else None
        loss.backward()
        if handle:
            handle.remove()

    record = LfUStep(model, backward=backward)(tiny_batch(1))
    assert record.skipped.startswith("non-finite")
    after = gradients(model)
    assert all(torch.isfinite(g).all() for g in after.values())
    if limit > 300:  # dropped as a whole, the earlier part intact
        if where == 2:  # the SFT part of this one stays
            plain = tiny_model("llama", dtype=torch.float32)
            LfUStep(plain, lam=0)(tiny_batch(1))
            earlier = {name: g + gradients(plain)[name] for name, g in earlier.items()}
        assert relative_difference(after, earlier) < 1e-6


def test_infinite_gradients_of_both_signs():
    model = tiny_model("llama", dtype=torch.float32)
    for i, p in enumerate(model.parameters()):
        p.register_hook(lambda g, sign=(-1) ** i: torch.full_like(g, sign * float("inf")))
    record = LfUStep(model)(tiny_batch())
    assert record.skipped.startswith("non-finite")
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def test_fp16_loss_scale_cancels():
    """A GradScaler's scale on both backward passes: the same gradients once unscaled, the same record."""
    found = []
    for scaler in (None, torch.amp.GradScaler(DEVICE, init_scale=1024.0)):
        model = tiny_model("llama")
        backward = torch.Tensor.backward if scaler is None else lambda loss, s=scaler: s.scale(loss).backward()
        step = LfUStep(model, ascent_steps=2, backward=backward, grad_scaler=scaler)
        record = step(tiny_batch())
        scale = 1.0 if scaler is None else scaler.get_scale()
        found.append(({n: g / scale for n, g in gradients(model).items()}, record))
    assert relative_difference(found[0][0], found[1][0]) < 1e-6
    for name in ("sft_loss", "consistency", "gradient_ratio", "ascent_grad_norm"):
        assert getattr(found[0][1], name) == pytest.approx(getattr(found[1][1], name), rel=1e-6)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_sample_of_theta_fits(sizes, limit):
    theta = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    with mock.patch("lfu.step.gradients.WHOLE", limit):
        chosen = sample_of(theta)
    assert chosen
    assert sum(p.numel() for p in chosen) <= max(limit, min(sizes))
    if sum(sizes) <= limit:
        assert len(chosen) == len(theta)


@pytest.mark.parametrize(("total", "room"), [(2**25, 2**25), (2**26, 2**22), (2**28, 2**23), (2**32, 2**25)])
def test_how_much_of_theta_is_measured(total, room):
    """All of it up to 2^25 elements, beyond that a 32nd within bounds."""
    theta = [torch.nn.Parameter(torch.empty(total // 2**12, device="meta")) for _ in range(2**12)]
    assert sum(p.numel() for p in sample_of(theta)) == room


def test_a_sampled_ratio_leaves_the_same_gradients(monkeypatch):
    found = []
    for limit in (10**9, 300):
        monkeypatch.setattr("lfu.step.gradients.WHOLE", limit)
        model = tiny_model("llama")
        LfUStep(model)(tiny_batch())
        LfUStep(model)(tiny_batch(1))
        found.append(gradients(model))
    assert relative_difference(*found) < 1e-14
