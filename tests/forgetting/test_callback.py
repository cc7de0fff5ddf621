"""ForgettingCallback in a run: it changes nothing, says the right things, holds to a budget, survives a kill."""

from __future__ import annotations

import json
import math
import shutil
import sys

import pytest
import torch
from runs import curve, trace, trainer
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, TrainerCallback

from lfu import ForgettingCallback
from lfu.forgetting import show
from lfu.forgetting.keep import FILE
from lfu.support.errors import UserError

TRAINERS = ["plain", "sft", "sft, lora", "dpo", "dpo, lora", "grpo"]
FEW = {"questions": 12, "passages": 10}
ALL = {"share_of_time": None, "page": False, "say": lambda line: None}


class Seen(TrainerCallback):
    """A tracker."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **more):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_with_it_is_bit_for_bit_the_run_without(name, tmp_path):
    options = {"max_steps": 4, "gradient_checkpointing": name == "sft"}  # TRL's default
    without = trainer(name, tmp_path / "without", **options)
    without.train()
    wanted = trace(without)
    run = trainer(name, tmp_path / "with", [ForgettingCallback(budget=10.0, every=2, **ALL)], **options)
    run.train()
    found = trace(run)
    for name_, weight in wanted.pop("weights").items():
        assert torch.equal(weight, found["weights"][name_]), name_
    for one, other in zip(wanted.pop("optimizer"), found["optimizer"], strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert wanted == {key: found[key] for key in wanted}
    assert [entry["step"] for entry in curve(run)] == [0, 2, 4]
    assert curve(run)[-1]["forgetting/kl"] > 0


@pytest.mark.parametrize(("name", "autocast"), [("plain", False), ("plain", True), ("sft, lora", True)])
def test_a_model_that_does_not_move_forgets_nothing(name, autocast, tmp_path):
    run = trainer(name, tmp_path, [ForgettingCallback(**ALL)], learning_rate=0.0, bf16=autocast)
    run.train()
    first, *rest = curve(run)
    assert len(rest) == 3
    for entry in rest:
        assert (entry["forgetting/lost"], entry["forgetting/gained"]) == (0, 0)
        assert entry["forgetting/kept"] == first["forgetting/known"] > 0
        assert entry["forgetting/prose_rise"] == entry["forgetting/kl"] == entry["forgetting/net_lost"] == 0


def test_figures_reach_every_tracker_once_and_flags_stay(tmp_path):
    seen = Seen()
    run = trainer("sft", tmp_path, [seen, ForgettingCallback(**ALL)], logging_steps=2)
    run.train()
    told = [logs for logs in seen.logs if "forgetting/known" in logs]
    assert [logs["forgetting/prose_loss"] for logs in told] == [e["forgetting/prose_loss"] for e in curve(run)]
    assert sum("loss" in logs for logs in seen.logs) == 3  # the trainer's own logging goes on


def test_every_n_steps_and_without_evaluation_ten_times(tmp_path):
    run = trainer("plain", tmp_path, [ForgettingCallback(every=3, **ALL)])
    run.train()
    assert [entry["step"] for entry in curve(run)] == [0, 3, 6]
    run = trainer("plain", tmp_path, [ForgettingCallback(**ALL)], eval_strategy="no", max_steps=20)
    run.train()
    assert [entry["step"] for entry in curve(run)] == list(range(0, 21, 2))


@pytest.mark.parametrize("name", ["plain", "sft, lora"])
def test_a_killed_and_resumed_run_has_the_same_curve(name, tmp_path):
    keep = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(name, tmp_path / "cut", [ForgettingCallback(**ALL)], **keep)
    whole.train()
    moved = shutil.copytree(tmp_path / "cut" / "checkpoint-2", tmp_path / "elsewhere" / "checkpoint-2")
    shutil.rmtree(tmp_path / "cut")
    callback = ForgettingCallback(**ALL)
    run = trainer(name, tmp_path / "cut", [callback], **keep)
    run.train(resume_from_checkpoint=str(moved))
    assert curve(run) == curve(whole)
    assert [reading.step for reading in callback.memory.readings] == [2, 4, 6]


def test_all_weights_resumed_without_what_the_untouched_model_said_is_one_line(tmp_path):
    keep = {"save_strategy": "steps", "save_steps": 2}
    trainer("plain", tmp_path, max_steps=2, **keep).train()
    with pytest.raises(UserError, match=f"resuming at step 2, and neither .* has a {FILE}"):
        trainer("plain", tmp_path, [ForgettingCallback(**ALL)], **keep).train(True)


def test_with_an_adapter_the_untouched_model_is_still_there_and_the_resumed_one_is_measured(tmp_path):
    keep = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer("sft, lora", tmp_path / "whole", [ForgettingCallback(**ALL)], **keep)
    whole.train()
    trainer("sft, lora", tmp_path / "lora", max_steps=2, **keep).train()
    run = trainer("sft, lora", tmp_path / "lora", [ForgettingCallback(**ALL)], **keep)
    run.train(resume_from_checkpoint=True)
    assert curve(run) == curve(whole)[1:]
    assert curve(run)[0]["forgetting/prose_rise"] != 0


def test_answers_to_other_items_are_not_taken_up(tmp_path):
    """A file that was changed in between, though it has as many rows."""
    file = tmp_path / "mine.jsonl"
    keep = {"save_strategy": "steps", "save_steps": 2}
    row = {"question": "Up?", "choices": ["yes", "no"], "answer": 0}
    file.write_text(json.dumps(row))
    trainer("plain", tmp_path / "run", [ForgettingCallback(files=file, **ALL)], max_steps=2, **keep).train()
    file.write_text(json.dumps(row | {"answer": 1}))
    with pytest.raises(UserError, match="with the same files and seed"):
        trainer("plain", tmp_path / "run", [ForgettingCallback(files=file, **ALL)], **keep).train(True)
    file.write_text(json.dumps(row))
    trainer("plain", tmp_path / "run", [ForgettingCallback(files=file, **ALL)], **keep).train(True)


def test_a_budget_that_is_spent_beyond_the_noise_stops_the_run(tmp_path):
    lines = []
    options = ALL | {"say": lines.append, "budget": {"prose": 0.02}, "every": 1}
    run = trainer("plain", tmp_path, [ForgettingCallback(stop=True, **options)], max_steps=30)
    run.train()
    assert run.state.global_step < 30
    last = curve(run)[-1]
    assert last["step"] == run.state.global_step
    assert last["forgetting/prose_rise"] > 0.02
    assert sum("the budget is spent" in line for line in lines) == 1
    assert sum("A third of this learning rate" in line for line in lines) == 1
    run = trainer("plain", tmp_path, [ForgettingCallback(**options)], max_steps=2)
    run.train()
    assert run.state.global_step == 2


def test_the_best_checkpoint_within_the_budget_is_left(tmp_path):
    best = dict(save_strategy="steps", save_steps=2, load_best_model_at_end=True, learning_rate=3e-3, max_steps=8)
    free = trainer("plain", tmp_path / "free", [ForgettingCallback(**ALL)], **best)
    free.train()
    rises = {entry["step"]: entry["forgetting/prose_rise"] for entry in curve(free)[1:]}
    assert free.state.best_global_step == 8  # the loss falls all the time, and so does what was known
    assert list(rises.values()) == sorted(rises.values())
    limit = (rises[4] + rises[6]) / 2
    lines = []
    callback = ForgettingCallback(budget={"prose": limit}, keep_best=True, **ALL | {"say": lines.append})
    run = trainer("plain", tmp_path / "held", [callback], **best)
    run.train()
    assert "step 4 is kept, the best within the budget" in lines
    assert not any("this learning rate" in line for line in lines)
    assert run.state.best_global_step == 4
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    assert run.state.best_metric == losses[4]
    assert all(loss < float("inf") for loss in losses.values())


@pytest.mark.parametrize("name", ["plain", "sft, lora"])
def test_a_run_that_breaks_is_over_its_budget_and_ends_in_words(name, tmp_path):
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **more):
            with torch.no_grad():
                [p.fill_(torch.nan) for p in model.parameters() if p.requires_grad and state.global_step == 3]

    said = []
    watch = ForgettingCallback({"prose": 10.0}, stop=True, share_of_time=None, say=said.append)
    run = trainer(name, tmp_path, [Breaks(), watch])
    run.train()
    _, fine, broken = curve(run)
    assert (fine["step"], broken["step"]) == (2, 4)
    assert broken["forgetting/lost"] == broken["forgetting/known"] > 0
    assert math.isnan(broken["forgetting/prose_rise"])
    assert math.isnan(broken["forgetting/kl"])
    assert [reading.shown for reading in watch.memory.readings] == [[], ["prose"]]
    assert any("broken" in line for line in said)


def test_no_checkpoint_within_the_budget_leaves_the_last_weights_and_says_so(tmp_path):
    lines = []
    best = dict(save_strategy="steps", save_steps=2, load_best_model_at_end=True)
    callback = ForgettingCallback(budget={"prose": 1e-9}, keep_best=True, **ALL | {"say": lines.append})
    run = trainer("plain", tmp_path, [callback], **best)
    run.train()
    assert run.state.best_model_checkpoint is None
    assert "no checkpoint was within the budget: the last weights are kept" in lines
    assert sum(f"A third of this learning rate ({run.args.learning_rate / 3:.1g})" in line for line in lines) == 1


def test_keep_best_says_which_arguments_are_missing(tmp_path):
    run = trainer("plain", tmp_path, [ForgettingCallback(budget=0.02, keep_best=True)])
    with pytest.raises(ValueError, match="set load_best_model_at_end=True"):
        run.train()


def test_a_file_in_another_encoding_is_told_with_its_place(tmp_path):
    (tmp_path / "law.txt").write_bytes(b"one\n\ncaf\xe9 two")
    with pytest.raises(ValueError, match=r"law\.txt: not UTF-8 text \(line 3, byte 4"):
        ForgettingCallback(files=tmp_path / "law.txt")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"stop": True}, "stop=True needs a budget"),
        ({"keep_best": True}, "keep_best=True needs a budget"),
        ({"share_of_time": 0}, "share_of_time must be above 0"),
        ({"share_of_time": 2}, "share_of_time must be above 0"),
        ({"every": 0}, "every must be a whole number from 1"),
        ({"batch_size": 1.5}, "batch_size must be a whole number from 1"),
        ({"budget": {"law": 0.1}}, "'law' is not measured"),
        ({"files": "nowhere.jsonl"}, "nowhere.jsonl: can't be read"),
    ],
)
def test_bad_arguments_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        ForgettingCallback(**options)


def test_no_tokenizer_is_one_line(tmp_path):
    run = trainer("plain", tmp_path, [ForgettingCallback(**ALL)])
    run.processing_class = run.callback_handler.processing_class = None
    with pytest.raises(ValueError, match="tokenizer="):
        run.train()


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_classifier_is_refused_in_one_line(tmp_path, kind):
    run = trainer("plain", tmp_path, [ForgettingCallback(**ALL)])
    run.model = run.model_wrapped = run.callback_handler.model = kind.from_config(run.model.config)
    with pytest.raises(ValueError, match=r"Classification gives logits of shape .* measured in causal language models"):
        run.train()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_breaks_a_line_between_words(capsys, monkeypatch, terminal):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    text = "step 120: 12 of 181 known answers lost, 10 gained; prose +0.039; KL 0.012; page in runs/a-b/" + "c" * 60
    show.say(text)
    lines = capsys.readouterr().err.rstrip("\n").split("\n")
    assert " ".join(line.strip() for line in lines) == f"forgetting: {text}"
    assert [len(line) <= 80 for line in lines] == ([True] * 3 if terminal else [False])


def test_the_page_has_curves_and_the_record_the_figures(tmp_path):
    lines = []
    callback = ForgettingCallback(budget=0.02, **ALL | {"page": True, "say": lines.append})
    trainer("plain", tmp_path, [callback]).train()
    record = json.loads((tmp_path / "forgetting" / "record.json").read_text())
    assert [point["step"] for point in record["results"]["curve"]] == [2, 4, 6]
    assert record["results"]["curve"][-1]["kl"] == callback.memory.readings[-1].figures["kl"]
    assert (tmp_path / "forgetting" / "index.html").is_file()
    assert "measuring took" in lines[-2]
    assert "index.html" in lines[-1]


def test_a_file_of_the_users_own_is_measured_beside(tmp_path):
    path = tmp_path / "law.jsonl"
    path.write_text('{"text": "The court is in session."}\n{"text": "All rise, please."}\n')
    run = trainer("plain", tmp_path, [ForgettingCallback(files=[path], budget="law=0.01", **ALL)])
    run.train()
    assert curve(run)[-1]["forgetting/law/loss"] == pytest.approx(
        curve(run)[0]["forgetting/law/loss"] + curve(run)[-1]["forgetting/law/rise"]
    )
