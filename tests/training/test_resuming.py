"""A run that goes on from another run's checkpoint: another method is refused, other differences are said."""

from __future__ import annotations

import warnings

import pytest
from test_trainer import trainer

from lfu.training.advice import LfUAdvice
from lfu.training.checkpoints import RUN_FILE, CheckpointError

SAVING = dict(save_strategy="steps", save_steps=2)
GEM = dict(method="gem", method_args="gem.beta=0.5")


def said_on_resuming(folder, first, then):
    """What is said where a run with the settings `then` goes on from the checkpoint of one with `first`."""
    trainer(folder / "first", max_steps=2, **SAVING | first).train()
    then = trainer(folder / "then", max_steps=3, **SAVING | then)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        then.train(resume_from_checkpoint=str(folder / "first" / "checkpoint-2"))
    return [str(each.message) for each in heard if issubclass(each.category, LfUAdvice)]


@pytest.mark.parametrize(
    ("first", "then", "was", "now"),
    [
        ({"alpha": 0.1}, {"alpha": 0.5, "lam": 2.0}, "alpha 0.1, lam auto", "alpha 0.5, lam 2.0"),
        ({"auxiliary": "lora"}, {"auxiliary": "steering"}, "auxiliary lora", "auxiliary steering"),
        (GEM, GEM | {"method_args": None}, "gem.beta 0.5", "gem.beta 0.7"),
        ({}, {"data": "uneven"}, "training rows 8 (hash ", "training rows 8 (hash "),
    ],
    ids=["step", "auxiliary", "method_args", "rows"],
)
def test_what_differs_is_said_with_both_values(tmp_path, first, then, was, now):
    (line,) = said_on_resuming(tmp_path, first, then)
    before, after = line.split("; from there this run goes on with ")
    assert f"checkpoint-2 was trained with {was}" in before
    assert after.startswith(now)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({}, {"learning_rate": 1e-3, "weight_decay": 0.1}),
        (GEM, {"method": "gem", "method_args": {"beta": 0.5}}),
        ({"method": "gem+neftune"}, {"method": "neftune+gem", "save_steps": 1}),
    ],
    ids=str,
)
def test_nothing_is_said_where_it_is_the_same_run_or_trains_at_another_rate(tmp_path, first, then):
    assert said_on_resuming(tmp_path, first, then) == []


def test_another_method_is_refused_and_a_checkpoint_that_does_not_say_is_taken(tmp_path):
    with pytest.raises(CheckpointError, match="is of method 'gem', and this run has 'l2sp': resume with the same"):
        said_on_resuming(tmp_path, {"method": "gem"}, {"method": "l2sp"})
    (tmp_path / "first/checkpoint-2" / RUN_FILE).unlink()  # as TRL's own checkpoints
    then = trainer(tmp_path / "then", max_steps=3, method="l2sp")
    with pytest.warns(LfUAdvice, match="holds nothing of method 'l2sp'"):
        then.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert then.state.global_step == 3
