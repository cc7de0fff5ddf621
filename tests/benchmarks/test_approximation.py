"""The comparison of approximate gradients: what is exact is one, what moves makes stale directions older."""

from __future__ import annotations

import pytest
import torch
from approximation import one_round, table
from stepcost.cases import Case, make_batch, make_model

from lfu import LfUStep


@pytest.mark.parametrize("theta", ["lora", "full"])
def test_forms_beside_the_exact_step_with_weights_still_and_moving(theta):
    batches = [make_batch(2, 12, 320) for _ in range(4)]
    found = {}
    for moving in (False, True):
        model = make_model(Case(theta, "tiny", batch=2, length=12))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        before = [p.detach().clone() for p in model.parameters()]
        forms = {"same": LfUStep(model), "every=4": LfUStep(model, every=4), "stale=4": LfUStep(model, stale=4)}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02) if moving else None
        found[moving] = one_round(LfUStep(model, lam=0.0), LfUStep(model), forms, batches, optimizer)
        moved = any(not torch.equal(p, was) for p, was in zip(model.parameters(), before))
        assert moved is moving
        for name in ("exact", "same"):
            assert found[moving][name].each == pytest.approx(1, abs=1e-3)
            assert found[moving][name].total == pytest.approx(1, abs=1e-3)
            assert found[moving][name].norm == pytest.approx(1, abs=1e-3)
        lazy = found[moving]["every=4"]
        assert lazy.each == pytest.approx(1, abs=1e-3)  # on the one micro-batch on which it acts
        assert lazy.total < 0.999
    still, old = found[False]["stale=4"], found[True]["stale=4"]
    assert 0 < old.total < still.total < 1
    assert old.each < still.each < 1
    assert "| stale=4 | " in table([found[True]])
