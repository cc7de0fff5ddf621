"""The live advice: which figures are told, once each, and which are not."""

from __future__ import annotations

import torch

from lfu.step.record import Record
from lfu.training.advice import Advice


def _advised(losses=(), records=()):
    messages: list[str] = []
    advice = Advice(5.0, warn=messages.append)
    for loss in losses:
        advice.watch_loss(loss)
    for record in records:
        advice.watch(record)
    return messages


def test_oscillating_losses_are_told_once_and_falling_or_noisy_ones_not():
    assert ["oscillates" in m for m in _advised([1.0, 3.0] * 20)] == [True]
    assert _advised([3.0 * 0.9**i for i in range(40)]) == []
    noise = torch.rand(200, generator=torch.Generator().manual_seed(0))
    assert _advised([2.0 + 0.3 * float(x) for x in noise]) == []


def test_a_run_that_skips_most_batches_is_told_why():
    messages = _advised(records=[Record(skipped="zero ascent gradient")] * 40)
    assert len(messages) == 1
    assert "not connected" in messages[0]
    assert _advised(records=[Record(skipped="no labelled token")] + [_healthy()] * 40) == []


def _healthy() -> Record:
    return Record(gradient_ratio=0.5, gradient_cosine=0.5, displacement={1: 0.05}, resolution=1e-7, tokens=5)
