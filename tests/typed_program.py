"""A user's program, as a strict type checker sees it: tests/test_packaging.py runs mypy on it, nothing else does."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import assert_type

import torch
from torch import nn

from lfu import LfUConfig, LfUStep, LfUTrainer, Record
from lfu.evaluation.forgetting import Forgetting, forgetting
from lfu.evaluation.intervals import Interval
from lfu.evaluation.score import ChoiceScores, TokenScores, answer_nll, multiple_choice
from lfu.methods import methods_of
from lfu.methods.method import Method
from lfu.model.loading import load_model
from lfu.step.consistency import consistency_of
from lfu.undesirable import Auxiliary, auxiliary_of


def train_by_hand(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> list[float]:
    step = LfUStep(model, auxiliary="lora", alpha=0.1, lam="auto", layers="early")
    losses = []
    for batch in batches:
        record = step(batch)
        assert_type(record, Record)
        assert_type(record.loss, float)
        assert_type(record.displacement, dict[int, float])
        assert_type(record.skipped, str | None)
        losses.append(record.sft_loss)
    assert_type(step.lam, float)
    assert_type(step.state_dict(), dict[str, torch.Tensor])
    return losses


def train_with_trl(folder: Path) -> str | None:
    config = LfUConfig(output_dir=str(folder), alpha=0.1, lam="auto", method="lfu+neftune")
    assert_type(config.alpha, float | str | None)
    assert_type(config.lam, float | str | None)
    assert_type(config.method, str)
    trainer = LfUTrainer("Qwen/Qwen3-0.6B", config)
    assert_type(trainer.last_record, Record | None)
    assert_type(trainer.step, LfUStep | None)
    assert_type(trainer.notes, list[str])
    assert_type(trainer.methods, list[Method])
    assert_type(trainer.make_auxiliary(), Auxiliary)
    return trainer.last_record.skipped if trainer.last_record else None


def what_was_forgotten(name: str, rows: list[dict[str, str]]) -> Interval:
    model, tokenizer = load_model(name)
    before = multiple_choice(model, tokenizer, rows)
    assert_type(before, ChoiceScores)
    assert_type(answer_nll(model, tokenizer, rows), TokenScores)
    change = forgetting(before.correct, before.correct)
    assert_type(change, Forgetting)
    return change.net


def parts() -> None:
    assert_type(auxiliary_of("steering"), Auxiliary)
    assert_type(consistency_of("cosine"), nn.Module)
    assert_type(methods_of("gem"), list[Method])
