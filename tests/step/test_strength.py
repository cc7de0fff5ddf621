"""lam="auto": the strength of the consistency term, held by its gradient."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_batch, tiny_model

from lfu import LfUStep
from lfu.step.strength import Strength


def test_strength_is_first_order_in_lam_times_alpha():
    """The two settings of the paper, 0.1 x 5 and 0.001 x 500, are of one strength; the loss values are not."""
    one, other = (LfUStep(tiny_model("llama"), alpha=a, lam=w)(tiny_batch()) for a, w in ((0.01, 5.0), (0.0001, 500.0)))
    assert one.gradient_ratio == pytest.approx(other.gradient_ratio, rel=0.05)
    assert one.consistency / other.consistency == pytest.approx(1e4, rel=0.1)


@given(st.floats(1e-6, 1e6), st.floats(0.01, 10))
def test_strength_finds_a_constant_ratio_at_once(unit, target):
    control = Strength(target, start=1e-9)
    assert control.lam == 1e-9
    control.update(unit)
    assert control.lam * unit == pytest.approx(target)
    control.update(math.nan)
    control.update(0.0)
    assert control.lam * unit == pytest.approx(target)
