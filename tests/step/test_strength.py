"""What "auto" does: lam holds the strength of the consistency, alpha grows until bfloat16 shows the move."""

from __future__ import annotations

import math
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import DEVICE, gradients, tiny_batch, tiny_model

from lfu import LfUStep
from lfu.step.step import sft_loss
from lfu.step.strength import PAPER, RESOLVED, Strength
from lfu.undesirable import KINDS

WIDE = dict(num_hidden_layers=2, hidden_size=64, head_dim=16)
STRONG = 1e3  # of lam: the consistency outweighs SFT
MANY = [tiny_batch(seed) for seed in range(12)]


def adapted(dtype=torch.bfloat16):
    """The same numbers in either dtype, with a float32 adapter.

    Its embeddings are large beside what the blocks add, as in real models: an ascent of 0.1 moves hidden states by
    less than two epsilons of bfloat16.
    """
    model = tiny_model("llama", theta="lora", dtype=torch.bfloat16, **WIDE).to(dtype)
    for name, p in model.named_parameters():
        size = 8 if "embed_tokens" in name else 0.5 if p.dim() > 1 else 1
        p.data = (p.data.float() if p.requires_grad else p.data) * size
    return model


def autocast():
    return torch.autocast(DEVICE, dtype=torch.bfloat16)


def mixed_step(model, kind, **options) -> LfUStep:
    def loss_fn(*arguments):
        with autocast():
            return sft_loss(*arguments)

    return LfUStep(model, auxiliary=kind, autocast=autocast, loss_fn=loss_fn, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_the_dtype_resolves_it_alpha_is_the_papers(dtype):
    found = []
    for alpha in ("auto", PAPER):
        model = tiny_model(dtype=dtype)
        step = LfUStep(model, alpha=alpha)
        records = [step(batch) for batch in MANY[:3]]
        found.append((records, gradients(model)))
        assert [(record.alpha, record.lam) for record in records] == [(0.1, 5.0)] * 3
    assert all(torch.equal(found[0][1][n], found[1][1][n]) for n in found[0][1])


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_it_grows_until_the_move_is_resolved_and_the_gradient_is_float32s(kind):
    exact, narrow = adapted(torch.float32), adapted()
    step = mixed_step(narrow, kind, lam=STRONG)
    records = [step(batch) for batch in MANY]
    assert records[0].alpha == PAPER
    assert records[-1].alpha > PAPER
    assert all(record.lam * record.alpha == pytest.approx(STRONG * PAPER) for record in records)
    moved = [median(record.displacement.values()) / record.resolution for record in records[4:]]
    assert median(moved) == pytest.approx(RESOLVED, rel=0.2)

    def gradient(model, make, alpha: float) -> torch.Tensor:
        model.zero_grad()
        make(model, kind, lam=STRONG, alpha=alpha)(MANY[0])
        return torch.cat([g.flatten().double() for g in gradients(model).values()])

    def cosine(alpha: float) -> float:
        plain = lambda model, kind, **options: LfUStep(model, auxiliary=kind, **options)
        found = gradient(exact, plain, alpha), gradient(narrow, mixed_step, alpha)
        return float(torch.cosine_similarity(*found, dim=0))

    assert cosine(records[-1].alpha) > 0.99
    assert cosine(records[-1].alpha) > cosine(PAPER)


def test_lam_auto_holds_its_ratio_while_alpha_grows():
    step = mixed_step(adapted(), "steering", lam="auto", strength=0.5)
    records = [step(batch) for batch in MANY]
    assert records[-1].alpha > PAPER
    assert median(record.gradient_ratio for record in records[3:]) == pytest.approx(0.5, rel=0.35)


def test_a_resumed_step_goes_on_with_the_alpha_it_had():
    step = mixed_step(adapted(), "steering")
    for batch in MANY[:4]:
        step(batch)
    again = mixed_step(adapted(), "steering")
    again.load_state_dict({name: float(value) for name, value in step.state_dict().items()})
    assert again.alpha == step.alpha > PAPER
    assert again.lam == step.lam


def test_what_moves_nothing_teaches_nothing():
    step = LfUStep(tiny_model(), lam=1.0)
    batch = tiny_batch()
    step(batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert step.alpha == PAPER


@pytest.mark.parametrize("kind", KINDS)
def test_a_stale_direction_keeps_the_alpha_that_it_was_moved_by(kind):
    """The record names it, and lam goes with it: the strength is the same from the first micro-batch on."""
    step = mixed_step(adapted(), kind, lam=STRONG, stale=3)
    records = []
    for batch in MANY[:6]:
        records.append(step(batch))
        again = mixed_step(adapted(), kind, lam=STRONG, stale=3)
        again.load_state_dict(step.state_dict())
        step = again
    assert [record.form for record in records] == ["exact", "first-order", "first-order"] * 2
    assert [record.alpha for record in records[:3]] == [PAPER] * 3
    assert step.alpha > PAPER
    assert len({record.alpha for record in records[3:]}) == 1
    assert all(record.lam * record.alpha == pytest.approx(STRONG * PAPER) for record in records)


# -- lam = auto --------------------------------------------------------------------------------------------------------


def test_strength_is_first_order_in_lam_times_alpha():
    """The two settings of the paper, 0.1 x 5 and 0.001 x 500, are of one strength; the loss values are not."""
    one, other = (LfUStep(tiny_model("llama"), alpha=a, lam=w)(tiny_batch()) for a, w in ((0.01, 5.0), (0.0001, 500.0)))
    assert one.gradient_ratio == pytest.approx(other.gradient_ratio, rel=0.05)
    assert one.consistency / other.consistency == pytest.approx(1e4, rel=0.1)


@given(st.floats(1e-6, 1e6), st.floats(0.01, 10))
def test_strength_finds_a_constant_ratio_at_once(unit, target):
    control = Strength(target, start=1e-9)
    assert control.lam == 1e-9
    control.learn(unit)
    assert control.lam * unit == pytest.approx(target)
    control.learn(math.nan)
    control.learn(0.0)
    assert control.lam * unit == pytest.approx(target)
