"""`lfu compare`: every wrong input that it must catch, what is left after one, presets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_study import QUICK, results, run, write_questions

from lfu.cli import compare, main, study, study_flags
from lfu.study.presets import shipped
from lfu.support.flags import given_flags

pytestmark = pytest.mark.usefixtures("quick_pictures")

# --- wrong inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("", "no methods: give --methods"),
        ("--methods sft,gme", "Did you mean gem?"),
        ("--methods sft,lfu:alhpa=1", "Did you mean alpha?"),
        ("--methods sft,sft", "--methods names 'sft' twice"),
        ("--methods gem+dft", "can't be combined"),
        ("--methods lfu:alpha=-1", "lfu alpha=-1: alpha must be a finite number > 0"),
        ("--methods gem:beta=x", "gem.beta must be"),
        ("--methods replay", "replay: method='replay' needs the general data"),
        ("--methods lfu:data_limit=900", "data_limit must be a whole number from 1 to the 28 rows"),
        ("--methods sft,ewc", "ewc: method 'ewc' weighs single weights: train all weights"),
        ("--methods sft,oft --use_peft false", "oft: method 'oft' starts an adapter: train one (--use_peft true"),
        ("--methods wise:use_dora=true", "with Dora they are not linear in the adapter's parameters"),
        ("--methods gem --lam 3", "--lam is LfU's own"),
        ("--methods lfu --method_args beta=3", "must be METHOD.SETTING=VALUE"),
        ("--methods lfu --method_args gem.beta=3", "'gem' is not compared"),
        ("--methods lfu --method sft", "--method is set by the study itself: give --methods"),
        ("--methods lfu --seed 3", "--seed is set by the study itself: give --seeds"),
        ("--methods lfu --eval_strategy epoch", "--eval_strategy is set by the study itself"),
        ("--methods lfu --lerning_rate 3", "Did you mean learning_rate"),
        ("--methods lfu --template chatt", "--template: invalid choice"),
        ("--methods lfu --seeds 0", "--seeds: must be"),
        ("--methods sft --methods gem --methods sft", "--methods names 'sft' twice"),
        ("--methods lfu --learning_rates 1e-4,3e-4 --learning-rate=1e-3", "--learning_rate would do nothing"),
        ("--methods lfu --seeds 1,1", "--seeds: must be"),
        ("--methods lfu --learning_rates 1e-4,x", "--learning_rates: must be"),
        ("--methods lfu --learning_rates 1e-4,0.0001", "--learning_rates: must be different"),
        ("--methods lfu --measures gian", "Did you mean gain?"),
        ("--methods lfu --submitit timeout_min", "--submitit: must be KEY=VALUE"),
        ("--methods lfu --preset tabel1", "Did you mean table1"),
        ("--preset steps", "--preset steps is for lfu sweep, not for lfu compare"),
        ("--methods lfu --data nowhere.jsonl", "no such file or folder"),
        ("--methods lfu --data_limit 10", "--data has 10 different rows, too few to split off 8 for test and 8 for"),
        ("--methods lfu --eval_data rows.jsonl", "--data has 0 different rows beside those held out"),
        ("--methods lfu --eval_data rows.jsonl --test_rows 8", "give one of them"),
        ("--methods lfu --retention nowhere.jsonl", "no such file or folder"),
        (
            "--methods lfu --retention rows.jsonl --retention rows=rows.jsonl",
            "two sets to keep are called",
        ),
        ("--methods lfu --retention_limit 3", "knowledge has 3 items to keep"),
        ("--methods lfu --packing true --max_steps -1", "with --packing give --max_steps"),
        ("--methods lfu --output_dir rows.jsonl", "is a file"),
        ("--methods lfu --config nowhere", "recipe nowhere"),
    ],
)
def test_mistakes_give_one_line_and_leave_nothing(here, model, capsys, flags, says):
    assert run(model, flags) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.strip().splitlines()[-1].startswith("lfu compare: error: ")
    assert captured.out == ""
    assert [path.name for path in here.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("words", "says"),
    [("", "no model: give --model_name_or_path"), ("--model m", "no training data: give --data")],
)
def test_without_model_or_data(here, capsys, words, says):
    assert main(["compare", *words.split()]) == 2
    assert says in capsys.readouterr().err


# --- what flags do --------------------------------------------------------------------------------------------------


def test_flags_go_to_whom_they_are_for(here, model, capsys):
    """LfU's own to LfU, knobs to their method, the rest to all; a recipe's word on method and output is passed over."""
    Path("first.yaml").write_text("weight_decay: 0.5\nlam: 3\nmax_grad_norm: 2\n")
    Path("my.yaml").write_text("method: lfu\noutput_dir: elsewhere\nlam: 2\nweight_decay: 0.1\nmax_grad_norm: null\n")
    flags = f"--methods gem,lfu --alpha 0.5 --blocks layers --method_args gem.beta=0.5 {QUICK}"
    assert run(model, flags, "--config first.yaml,my.yaml --preset instruct") == 0
    configs = {c["label"]: c["config"] for c in map(read, Path("out").glob("runs/*/config.json"))}
    assert configs["gem"]["method_args"] == "gem.beta=0.5,gem.h=linear"
    assert (configs["lfu"]["alpha"], configs["lfu"]["lam"], configs["lfu"]["preset"]) == (0.5, 2.0, "instruct")
    assert configs["lfu"]["method_args"] is None
    assert configs["sft"]["lam"] == 0
    assert {configs[label]["weight_decay"] for label in ("sft", "gem", "lfu")} == {0.1}
    assert {configs[label]["max_grad_norm"] for label in ("sft", "gem", "lfu")} == {1.0}
    assert {configs[label]["blocks"] for label in ("sft", "gem", "lfu")} == {"layers"}
    assert "sft is added: it is what the others are measured against" in capsys.readouterr().err
    assert not Path("elsewhere").exists()


def read(path):
    return json.loads(path.read_text())


def test_a_flag_wins_over_the_preset(here, model):
    Path("mine.yaml").write_text(
        "verb: compare\nmethods: [sft, gem]\nlearning_rates: 1e-2,3e-2\nmeasures: none\nlora_r: 4\n"
    )
    assert run(model, "--preset mine.yaml --max_steps 1") == 0  # --learning_rate is among the tests' own flags
    found = results()
    assert found["search"] == {}
    assert set(found["settings"]) == {"sft", "gem"}
    assert {c["config"]["learning_rate"] for c in map(read, Path("out").glob("runs/[!u]*/config.json"))} == {0.01}


def test_lists_add_up_and_take_the_place_of_a_presets(tmp_path):
    Path(tmp_path / "mine.yaml").write_text("verb: compare\nmethods: [sft, gem]\nretention: [a]\n")
    parser = study._parser("compare", compare.Compare, None)
    preset = f"--preset={tmp_path / 'mine.yaml'}"
    for words, methods, retention in (
        ([], ["sft", "gem"], ["a"]),
        (["--retention", "b", "--retention", "c=d", "e"], ["sft", "gem"], ["b", "c=d", "e"]),
        (["--methods", "lfu", "--methods", "sam,im"], ["lfu", "sam,im"], ["a"]),
    ):
        given, _ = study_flags.with_presets(parser, "compare", [preset, *words])
        assert (given.methods, given.retention) == (methods, retention)


@pytest.mark.parametrize(
    ("flags", "steps", "rate"),
    [
        ("", 15, "0.0002"),
        ("--use_peft false", 15, "0.0001"),
        ("--careful false", 3, "0.0001"),
        ("--num_train_epochs 2", 2, "0.0001"),
        ("--num_train_epochs 2 --careful true", 2, "0.0002"),
        ("--methods sft:max_steps=2", 3, "0.0001"),
        ("--learning_rate 1e-3", 3, "0.001"),
    ],
)
def test_few_rows_are_trained_on_as_long_as_lfu_train_would(here, model, capsys, monkeypatch, flags, steps, rate):
    """Of 24 rows 8 are left for training, one update's worth. Explicit flags and settings stay as they are."""
    monkeypatch.setattr(study, "_work", lambda *given: None)
    monkeypatch.setattr(study, "_report", lambda made, *given: seen.append(made) or 0)
    seen: list = []
    write_questions(Path("rows.jsonl"), 24)
    words = ["compare", "--model", model, "--data", "rows.jsonl", "--output_dir", "out", "--methods", "sft"]
    assert main([*words, "--measures", "none", *flags.split()]) == 0
    (made,), err = seen, capsys.readouterr().err
    run = made.design.first_run(made.design.settings[0], made.design.rates[0])
    assert (run.steps, run.learning_rate) == (steps, rate)
    chosen = [line for line in made.split.said if "chosen by the number of training rows" in line]
    assert bool(chosen) == ("chosen for 8 rows (your own flags win; --careful false" in err)
    assert bool(chosen) == (rate == "0.0002" or steps == 15)
    assert not [word for word in made.command(run) if "careful" in word]


def test_rows_of_ones_own_for_test_and_validation(here, model):
    write_questions(Path("more.jsonl"), 60)
    lines = Path("more.jsonl").read_text().splitlines(keepends=True)
    Path("test.jsonl").write_text("".join(lines[44:52]))
    Path("dev.jsonl").write_text("".join(lines[52:]))
    assert run(model, f"--methods sft --eval_data test.jsonl --eval_limit 6 --validation_data dev.jsonl {QUICK}") == 0
    same = results()["same"]
    assert (same["training rows"], same["validation rows"], same["test rows"], same["rows"]) == (44, 8, 6, [])


def test_the_built_in_set_has_test_rows_of_its_own(here, model):
    assert run(model, f"--methods sft --data word_problems:24 --test_rows 5 {QUICK}") == 0
    same = results()["same"]
    assert (same["training rows"], same["validation rows"], same["test rows"]) == (16, 8, 5)


def test_models_can_be_kept_and_trained_further(here, model):
    from lfu.model.loading import load_model

    assert run(model, f"--methods sft --keep_models {QUICK}", out="first") == 0
    (adapter,) = (here / "first").glob("runs/sft*/model")
    assert load_model(str(adapter))
    assert run(str(adapter), "--methods sft,lfu --measures distance") == 0
    cost = results()["modes"]["steps"]["cost"]
    assert 0 < cost["sft"]["distance"] < 1


OF_THE_PAPER = ("first3", "table1", "table3", "table5", "table6")


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_presets(shelf, model, name):
    measures = "" if name == "table3" else "--measures gain"
    more = "--method_args sdft.max_new_tokens=2" if name == "table1" else ""
    assert run(model, f"--preset {name} --match_rows 0 --max_steps 1 {measures} {more}") == 0
    found = results()
    assert found["whole"]
    failed = {r["label"]: r["error"] for r in found["runs"] if r["state"] == "failed"}
    assert set(failed) == ({"lfu layers=late"} if name == "table5" else set())  # two layers have no late third
    wanted = {"table1": 7, "table3": 3, "table5": 11, "table6": 6, "first3": 5}[name]
    assert len(found["settings"]) == wanted
    assert bool(found["metrics"]) == (name != "table3")
    lams = {label: one["differs"].get("lam") for label, one in found["settings"].items()}
    assert lams["lfu"] == ("5.0" if name == "table5" else "auto")  # table5 is the paper's
    assert lams.get("logit_kl", lams["lfu"]) == lams["lfu"]


def test_the_demo_shows_forgetting_as_it_happens_and_what_to_do_next(here, model, capsys):
    assert run(model, "--preset demo --max_steps 6 --test_rows 8 --retention_limit 9") == 0
    printed = capsys.readouterr().out
    assert "Results, one seed" in printed
    found = results()
    assert found["whole"]
    assert set(found["settings"]) == {"sft", "l2sp share=0.22"}
    assert {r["state"] for r in found["runs"]} == {"finished"}
    (folder,) = Path("out/runs").glob(f"{found['recommended']['label'].split()[0]}*/model")
    assert f"talk     lfu chat {folder} --beside {model}" in printed
    assert "next     lfu compare --model smollm2 --data YOUR_ROWS.jsonl" in printed
    curves = found["modes"]["steps"]["forgetting"]
    assert all(readings[-1]["step"] == 6 for seeds in curves.values() for readings in seeds.values())
    assert "](forgetting.png)" in Path("out/report.md").read_text()


def test_the_frontier_thins_its_candidates_out(here, model, monkeypatch, tmp_path):
    """The shipped preset, with methods of two rates to be quick: 6 candidates, then 2, then in full."""
    monkeypatch.setenv("LFU_CACHE", str(tmp_path / "cache"))
    less = "--methods sft,l2sp,anchor:texts=2:tokens=2 --learning_rates 1e-2,3e-2 --seeds 1 --max_steps 9"
    less += " --measures gain,forgetting --match_rows 0 --retention_limit 6"
    assert run(model, f"--preset frontier {less}") == 0
    found = results()
    assert found["whole"]
    runs = [r for r in found["runs"] if r["label"] != "untouched"]
    assert {r["state"] for r in runs} == {"finished"}
    assert [sum(r["steps"] == steps for r in runs if r["level"] == "rung") for steps in (1, 3)] == [6, 2]
    full = {r["label"] for r in runs if r["level"] == "full"}
    assert "sft" in full
    assert full == set(found["settings"]) < {"sft", "l2sp", "anchor texts=2 tokens=2"}
    assert any("6 trained for 11% of the steps, 2 trained for 33%" in line for line in found["same"]["rows"])
    assert not list(Path("out/runs").glob("*/model"))
    assert run(model, f"--preset frontier {less}") == 0
    assert results()["runs"] == found["runs"]


def test_every_candidate_of_the_shipped_frontier_is_known():
    parser = study._parser("compare", compare.Compare, None)
    given, _ = study_flags.with_presets(parser, "compare", ["--preset", "frontier"])
    assert given.halving
    settings = compare.Compare(**given_flags(compare.Compare, given)).settings(given.learning_rates)["settings"]
    candidates = len(settings) * len(given.learning_rates)
    assert candidates == 28  # what test_plan counts the cost of


def test_results_in_the_form_of_pefts_comparison(here, model, capsys, monkeypatch):
    """The shipped preset on tiny rows, then the script that puts the record into PEFT's form."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import peft_metamath

    rows = [{"query": f"{i} + {i}", "response": f"It is\n#### {2 * i}" + "x" * 1300 * (i == 7)} for i in range(30)]
    short = peft_metamath.training_rows(rows)
    assert len(short) == 29
    assert short[1] == {"prompt": "Question: 1 + 1 Think step by step.\nAnswer:", "completion": " It is\n#### 2"}
    folder = Path("peft-metamath")
    folder.mkdir()
    texts = [{"text": f"Text number {i} says so."} for i in range(9)]
    parts = {"train": short[:12], "validation": short[12:20], "test": short[20:], "wikipedia": texts}
    for name, each in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    words = f"compare --preset peft-metamath --model {model} --methods sft,l2sp --max_steps 1 --dtype float32"
    quick = "--bf16 false --retention_limit 9 --max_new_tokens 2 --output_dir out"
    assert main([*words.split(), *quick.split()]) == 0
    capsys.readouterr()
    assert peft_metamath.main(["form", "out/record.json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["experiment_name"] for entry in entries] == ["sft", "l2sp"]
    assert all(entry["test accuracy"] == 0 and entry["train_time"] > 0 for entry in entries)
    assert len({entry["num_trainable_params"] for entry in entries}) == 1
    Path("other.json").write_text('{"results": {"modes": {}, "metrics": {}}}')
    assert peft_metamath.main(["form", "other.json"]) == 2
    assert "not one of --preset peft-metamath" in capsys.readouterr().err


def test_a_round_of_halving_that_is_all_warm_up_is_refused(here, model, capsys):
    """At a learning rate of 0 all candidates look alike, and the first would be taken for the best."""
    few = f"--methods sft,gem --halving {QUICK} --max_steps 9"
    assert run(model, few) == 2
    assert "sft: --halving trains for 1 step of 9 at first, all of it warm-up" in capsys.readouterr().err


def test_halving_and_equal_time_are_refused(here, model, capsys):
    assert run(model, f"--methods sft,gem --halving --equal time {QUICK}") == 2
    assert "--halving compares trainings of equal steps" in capsys.readouterr().err


def test_presets_are_listed(capsys):
    assert main(["compare", "--list_presets"]) == 0
    listed = capsys.readouterr().out
    assert re.findall(r"--preset (\S+)", listed) == list(shipped())


def test_help_is_quick_and_whole(capsys):
    assert main(["compare", "--help"]) == 0
    out = capsys.readouterr().out
    for flag in ("--methods", "--seeds", "--learning_rates", "--equal", "--retention", "--jobs", "--submitit"):
        assert flag in out
