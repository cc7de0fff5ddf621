"""The controlled test bed: exact skills, no test row trained on, ties where methods are the same, resume."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfu import LfUTrainer
from lfu.report.testbed_view import ahead_of_sft, chosen_of, front, summarise, view
from lfu.study.testbed import __main__ as bed
from lfu.study.testbed.model import batch_of, make_model, make_tokenizer, scores, token_row
from lfu.study.testbed.run import fine_tune, old_rows, test_sets, training_rows
from lfu.study.testbed.settings import SHORT, Setting
from lfu.study.testbed.settings import settings as all_settings
from lfu.study.testbed.skills import FACTS, LETTERS, OTHERS, SKILLS, TARGET, fact, rows, vocabulary

test_sets.__test__ = False


@given(st.sampled_from(sorted(SKILLS)), st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_every_answer_is_the_skills(name, seed):
    """Each skill once more, written another way."""
    row = SKILLS[name].row(random.Random(seed))
    words = 2 if name == TARGET else 1
    command, given_, equals = row.prompt[:words], row.prompt[words:-1], row.prompt[-1]
    *out, end = row.answer
    assert " ".join(command) in SKILLS[name].words
    assert (equals, end) == ("=", "<end>")
    text, answer = "".join(given_), "".join(out)
    turned = str.maketrans(LETTERS, LETTERS[1:] + LETTERS[0])
    expected = {
        "copy": lambda: text,
        "reverse": lambda: "".join(reversed(text)),
        "sort": lambda: "".join(sorted(text)),
        "shift": lambda: text.translate(turned),
        "turn": lambda: "".join(reversed(text)).translate(turned),
        "add": lambda: f"{int(text[:2]) + int(text[3:]):03d}",
        "count": lambda: str(text[3:].count(text[0])),
        "fact": lambda: "".join(fact([fact(n)[0] for n in range(FACTS)].index(list(text)))[1]),
    }
    assert answer == expected[name]()


def test_rows_are_different_repeatable_and_of_the_words_asked_for():
    one = rows("sort", 50, 3, word=1)
    assert one == rows("sort", 50, 3, word=1) != rows("sort", 50, 4, word=1)
    assert len(set(one)) == 50
    assert {row.prompt[0] for row in one} == {SKILLS["sort"].words[1]}
    assert len(rows("fact", FACTS, 0, 0)) == FACTS
    with pytest.raises(ValueError, match="fewer than"):
        rows("fact", FACTS + 1, 0, 0)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_test_row_of_the_target_is_trained_on(seed):
    prompts = {tuple(token_row(row)["input_ids"]) for name in ("target", "reworded") for row in test_sets()[name]}
    inputs = {ids[2:] for ids in prompts}  # whatever the command
    trained = [token_row(row) for row in training_rows(64, seed)]
    assert len(trained) == 64
    assert not inputs & {tuple(row["input_ids"][2:]) for row in trained}
    command = [vocabulary().index(word) for word in SKILLS[TARGET].words[0].split()]
    assert all(row["input_ids"][:2] == command for row in trained)
    assert training_rows(64, seed) == training_rows(64, seed) != training_rows(64, seed + 10)
    assert not set(old_rows(200, seed)) & {row for tested in test_sets().values() for row in tested}


def test_scores_are_those_of_one_row_at_a_time_and_of_greedy_decoding():
    model = make_model(0).eval()
    tested = [*rows("copy", 5, 0), *rows("count", 5, 0)]
    nll, right = scores(model, tested)
    tokenizer = make_tokenizer()
    for row, value, correct in zip(tested, nll, right):
        one = batch_of([row])
        labels = one.pop("labels")
        logits = model(**one).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100)
        assert value == pytest.approx(float(expected.detach()), rel=1e-4)
        prompt = tokenizer(" ".join(row.prompt), return_tensors="pt")["input_ids"]
        out = model.generate(prompt, max_new_tokens=len(row.answer), do_sample=False)[0, prompt.shape[1] :]
        assert (out.tolist() == [vocabulary().index(w) for w in row.answer]) == correct


def test_sft_and_lfu_with_lam_0_tie_exactly():
    start = make_model(0).state_dict()
    brief = {"num_train_epochs": 1}
    tuned = [
        fine_tune(start, Setting("x", "", method, {**brief, **more}), 16, 1).state_dict()
        for method, more in (("sft", {}), ("lfu", {"lam": 0.0}))
    ]
    assert all(torch.equal(tuned[0][name], tuned[1][name]) for name in start)
    assert any(not torch.equal(tuned[0][name], start[name]) for name in start)


def test_all_methods_see_the_same_rows_in_the_same_order(monkeypatch):
    """Whatever they draw themselves: noise, an auxiliary, a second pass. Another seed has another order."""
    seen: list = []
    step = LfUTrainer.training_step

    def recorded(trainer, model, inputs, *more):
        seen.append(inputs["input_ids"].tolist())
        return step(trainer, model, inputs, *more)

    monkeypatch.setattr(LfUTrainer, "training_step", recorded)
    start, orders = make_model(0).state_dict(), {}
    for method, seed in [("sft", 1), ("lfu", 1), ("lfu_reps", 1), ("neftune", 1), ("sam", 1), ("sft", 2)]:
        seen.clear()
        fine_tune(start, Setting("x", "", method, {"num_train_epochs": 2}), 32, seed)
        orders[method, seed] = list(seen)
    assert len(orders["sft", 1]) == 4
    assert orders["sft", 1][:2] != orders["sft", 1][2:]  # shuffled anew
    assert all(order == orders["sft", 1] for (_, seed), order in orders.items() if seed == 1)
    assert orders["sft", 2] != orders["sft", 1]


def test_im_and_replay_train_on_the_same_tokens(monkeypatch):
    """They take rows as texts: IM's loss is on every token, replay adds rows of the other skills."""
    seen: list = []

    def recorded(trainer, model, inputs, *more):
        for ids, labels in zip(inputs["input_ids"].tolist(), inputs["labels"].tolist()):
            count = ids.index(1) + 1  # up to the end; then padding
            seen.append((tuple(ids[:count]), tuple(labels[:count])))
        return torch.zeros(())

    monkeypatch.setattr(LfUTrainer, "training_step", recorded)
    start, trained = make_model(0).state_dict(), {}
    for method, options in [("sft", {}), ("im", {}), ("replay", {"method_args": "replay.share=0.2"})]:
        seen.clear()
        fine_tune(start, Setting("x", "", method, {"num_train_epochs": 1, **options}), 16, 1)
        trained[method] = set(seen)
    assert {ids for ids, _ in trained["im"]} == {ids for ids, _ in trained["sft"]}
    assert all(labels == ids for ids, labels in trained["im"])
    assert len(trained["sft"]) == 16
    more = trained["replay"] - trained["sft"]
    assert len(trained["replay"]) == 20
    old = [token_row(row) for row in old_rows(1000, 1)]
    assert more <= {(tuple(row["input_ids"]), tuple(row["labels"])) for row in old}


def test_all_settings_are_valid_and_named_apart():
    from lfu.methods import methods_of

    names = [setting.name for setting in all_settings()]
    assert len(set(names)) == len(names)
    assert names[0] == "sft"
    for setting in all_settings():
        if setting.method != "replay":  # its data are made for each run
            methods_of(setting.method, setting.options.get("method_args"))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points):
    edge = front(points)
    assert edge
    for p in points:
        beaten = any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)
        assert (p in edge) != beaten


def test_a_method_is_held_against_all_that_sft_reaches_in_the_same_seed():
    entry = lambda family, target, others: {
        "family": family, ("target", "accuracy"): target, ("others", "accuracy"): others,
    }  # fmt: skip
    base = {"target": {"accuracy": 0.0}, "others": {"accuracy": 1.0}}
    summary = {
        "sft": entry("sft", [0.8, 0.8], [0.4, 0.6]),
        "sft small": entry("sft, learning rate", [0.4, 0.4], [0.8, 0.8]),
        "sft bad": entry("sft, epochs", [0.4, 0.4], [0.3, 0.3]),
        "kl 1": entry("kl", [0.6, 0.2], [0.7, 0.9]),  # the front at 0.55 is 0.65; at 0.2 it is 0.9
        "kl 2": entry("kl", [0.9, 0.9], [0.4, 0.7]),  # 0.1 further than SFT ever learned
    }
    ahead = ahead_of_sft(summary, base)
    assert ahead["sft"] == ahead["sft small"] == pytest.approx([0, 0])
    assert ahead["sft bad"] == pytest.approx([-0.25, -1 / 3])
    assert ahead["kl 1"] == pytest.approx([0.05, 0.0])
    assert ahead["kl 2"] == pytest.approx([0.1, 0.1])
    assert chosen_of("kl", summary, ahead, 1) == "kl 2"


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("lfu.study.testbed.run.EPOCHS", 31),
        ("lfu.study.testbed.run.LEARNING_RATE", 2e-3),
        ("lfu.evaluation.record.versions", lambda: {"torch": "0.1"}),
    ],
)
def test_a_run_is_done_again_when_what_decides_it_changes(what, other, monkeypatch):
    key = lambda: bed._key(Namespace(rows=8, steps=2), Setting("sft", "", "sft"), 0)
    before = key()
    assert key() == before
    monkeypatch.setattr(what, other)
    assert key() != before


def test_a_killed_study_goes_on_and_reports_the_same(tmp_path, capsys):
    """In one process, then what is left in two."""
    arguments = ["--out", str(tmp_path / "a"), "--seeds", "2", "--rows", "8", "--steps", "2", "--families", "dft"]
    assert bed.main([*arguments, "--jobs", "1"]) == 0
    whole = json.loads((tmp_path / "a" / "record.json").read_text())
    runs = sorted((tmp_path / "a" / "runs").glob("*.json"))
    assert len(runs) == 4
    for lost in runs[:2]:
        lost.unlink()
    kept = {run: run.stat().st_mtime_ns for run in runs[2:]}
    assert bed.main([*arguments, "--jobs", "2"]) == 0
    again = json.loads((tmp_path / "a" / "record.json").read_text())
    assert again["results"] == whole["results"]
    assert {run: run.stat().st_mtime_ns for run in kept} == kept
    assert "dft" in (tmp_path / "a" / "report.md").read_text()
    summary = summarise(whole["results"]["runs"])
    assert set(summary) == {"sft", "dft"}
    assert view(whole).title
    assert set(whole["results"]["base"]) >= {"target", "reworded", "others", *OTHERS}


def test_what_is_run_unless_more_is_asked_for():
    """Plain SFT with its learning rates and epochs, and each curve whole; few enough for half an hour."""
    options = lambda **given: Namespace(**({"all": False, "families": None} | given))
    short = bed._chosen(options())
    assert {setting.family for setting in short} == set(SHORT)
    assert {"sft", "sft, learning rate", "sft, epochs", "lfu", "l2sp"} <= set(SHORT)
    assert len(short) <= 40
    assert bed._chosen(options(all=True)) == all_settings()
    assert [s.family for s in bed._chosen(options(families=["dft"]))] == ["sft", "dft"]


def test_a_process_that_dies_is_one_line(tmp_path, monkeypatch, capsys):
    class Dying(Executor):
        def __init__(self, *args):
            pass

        def map(self, *args):
            raise BrokenProcessPool

    monkeypatch.setattr(bed, "ProcessPoolExecutor", Dying)
    arguments = ["--out", str(tmp_path), "--seeds", "1", "--rows", "8", "--steps", "1", "--families", "dft"]
    assert bed.main(arguments) == 2
    assert "a process died, perhaps of too little memory" in capsys.readouterr().err


def test_an_unknown_family_is_refused(tmp_path, capsys):
    assert bed.main(["--out", str(tmp_path), "--families", "magic"]) == 2
    assert "unknown family 'magic': use sft" in capsys.readouterr().err
