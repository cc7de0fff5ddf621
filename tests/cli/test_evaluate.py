"""`lfu evaluate` on tiny models: what it writes and says, bases and labels, going on, and every wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness_data import write_local
from peft import LoraConfig, get_peft_model
from tiny_folder import byte_tokenizer, save_model

from lfu.cli import main
from lfu.model.loading import load_model

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("few_pictures")

TWO = "arc_easy,mathqa"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`base`, two adapters on it, `plain` without a chat template, and `data`."""
    place = tmp_path_factory.mktemp("models")
    save_model(place / "base")
    save_model(place / "plain", chat=False)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model, tokenizer = load_model(str(place / "base"))
        config = LoraConfig(r=2, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    write_local(place / "data")
    return place


@pytest.fixture
def here(tmp_path, folders, monkeypatch):
    """A working folder from which the models and the data can be reached, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LFU_CACHE", str(tmp_path / "cache"))
    for entry in folders.iterdir():
        Path(entry.name).symlink_to(entry)
    return tmp_path


@pytest.fixture
def scored(here, folders, monkeypatch):
    """The same, with what other tests of this file have scored."""
    monkeypatch.setenv("LFU_CACHE", str(folders.with_name("scored")))
    return here


def run(*words, tasks=TWO):
    return main(["evaluate", *words, "--data_dir", "data", "--tasks", tasks, "--batch_size", "2"])


def record(folder="runs/evaluate"):
    return json.loads(Path(folder, "record.json").read_text())


# --- what it does ----------------------------------------------------------------------------------------------------


def test_an_adapter_brings_its_base_along(here, capsys):
    assert run("one") == 0
    out, err = capsys.readouterr()
    found = record()
    assert list(found["models"]) == ["base", "one"]
    assert found["results"]["base"] == "base"
    assert found["models"]["one"]["weights"] != found["models"]["base"]["weights"]
    change = found["results"]["forgetting"]["one"]["arc_easy"]
    assert change["items"] == change["kept"] + change["lost"] + change["gained"] + change["never"] == 4
    assert (found["kind"], found["seed"]) == ("evaluate", 1234)
    assert found["command"] == f"lfu evaluate one --data_dir data --tasks {TWO} --batch_size 2"
    assert found["versions"]["lm_eval"]
    assert "peft=one,tokenizer=one," in found["settings"]["same with the harness alone"]
    # progress line by line, and at the end tables and files
    assert "[1/4] base: mathqa: 2 items" in err
    assert "[4/4] one: arc_easy: 4 items" in err
    assert "one against base: " in out
    assert "arc_easy" in out
    assert out.splitlines()[-3:] == [
        "page     runs/evaluate/index.html", "text     runs/evaluate/report.md", "numbers  runs/evaluate/record.json",
    ]  # fmt: skip
    assert {"index.html", "report.md", "record.json", "tasks.png", "tasks"} == {
        path.name for path in Path("runs/evaluate").iterdir()
    }


def test_the_whole_paper_with_what_is_missing(here, capsys):
    assert main(["evaluate", "base", "--data_dir", "data", "--limit", "1"]) == 0
    out, err = capsys.readouterr()
    results = record()["results"]
    gone = ["asdiv", "piqa", "hellaswag", "coqa", "toxigen"]
    assert [one["task"] for one in results["missing"]] == gone
    assert all(f"missing: {task}: data/{task}/" in err for task in gone)
    assert not any(category["complete"] for category in results["categories"].values())
    assert results["categories"]["Math"]["tasks"] == ["gsm8k", "mathqa"]
    assert "Not measured: asdiv, piqa, hellaswag, coqa and toxigen" in " ".join(out.split())
    assert results["tasks"]["gsm8k"]["items"] == 1
    assert results["tasks"]["gsm8k"]["fewshot"] == 5


def test_several_adapters_share_a_base_and_are_ranked(scored):
    assert run("one", "other=two") == 0
    results = record()["results"]
    assert list(results["forgetting"]) == ["one", "other"]
    assert set(results["ranks"]) == {"one", "other"}


@pytest.mark.parametrize(
    ("words", "labels", "base"),
    [
        (["base"], ["base"], None),
        (["one", "--base", "none"], ["one"], None),
        (["one", "--base", "plain"], ["base", "one"], "base"),
        (["one", "plain"], ["one", "plain"], None),  # whose base should it be?
        (["one", "old=base"], ["old", "one"], "old"),
        (["new=plain", "old=base", "--base", "old"], ["old", "new"], "old"),
        (["plain", "base", "--base", "base"], ["base", "plain"], "base"),
    ],
)
def test_bases(scored, words, labels, base):
    assert run(*words, tasks="arc_easy") == 0
    found = record()
    assert list(found["models"]) == labels
    assert found["results"]["base"] == base
    assert list(found["results"]["forgetting"]) == [label for label in labels if base and label != base]


def test_categories_of_ones_own(here):
    Path("mine.yaml").write_text("categories: {Sums: [{task: mathqa, metric: acc}], All: [arc_easy, truthfulqa_mc1]}")
    words = ["evaluate", "base", "--data_dir", "data", "--categories", "mine.yaml", "--output_dir", "out"]
    assert main(words) == 0
    results = record("out")["results"]
    assert list(results["categories"]) == ["Sums", "All"]
    assert results["tasks"]["mathqa"]["metric"] == "acc,none"
    assert results["categories"]["All"]["complete"]


def test_a_second_run_is_from_the_cache_and_says_so(here, capsys):
    assert run("base") == 0
    first = record()
    capsys.readouterr()
    assert run("base") == 0
    assert "[2/2] base: arc_easy: 4 items, from the cache" in capsys.readouterr().err
    second = record()
    assert second["results"]["tasks"] == first["results"]["tasks"]
    assert run("base", "--no_cache") == 0
    assert "from the cache" not in capsys.readouterr().err
    assert run("base", "--limit", "2") == 0
    assert "from the cache" not in capsys.readouterr().err


def test_no_cache_leaves_none(here):
    assert run("base", "--no_cache", tasks="arc_easy") == 0
    assert not Path("cache").exists()


def test_ctrl_c_keeps_what_is_finished(here, monkeypatch, capsys):
    from lfu.evaluation import suite

    real, started = suite.run_task, []

    def stop(model, tokenizer, task, *args, **options):
        started.append(task.name)
        if len(started) == 2:
            raise KeyboardInterrupt
        return real(model, tokenizer, task, *args, **options)

    monkeypatch.setattr(suite, "run_task", stop)
    assert run("base") == 130
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == (
        "lfu evaluate: interrupted. Finished tasks are kept: the same command continues from there."
    )
    assert not Path("runs").exists()
    assert run("base") == 0
    assert "mathqa: 2 items, from the cache" in capsys.readouterr().err


def test_flags_reach_the_harness(here):
    assert run("base", "--num_fewshot", "2", "--seed", "7", "--max_length", "900", tasks="arc_easy,truthfulqa_mc2") == 0
    found = record()
    assert {name: row["fewshot"] for name, row in found["results"]["tasks"].items()} == {
        "arc_easy": 2, "truthfulqa_mc2": 0,
    }  # fmt: skip
    assert found["seed"] == 7
    by_hand = found["settings"]["same with the harness alone"]
    for words in ("--num_fewshot 2", "--seed 7", "max_length=900", "--include_path runs/evaluate/tasks"):
        assert words in by_hand


def test_the_written_definitions_are_what_was_run(here):
    """The harness alone, with the definitions in the output folder, gets the figures of the record."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    assert run("base", "--batch_size", "1", tasks="arc_easy,mmlu,lambada_openai") == 0
    manager = TaskManager(include_path="runs/evaluate/tasks", include_defaults=False)
    model, tokenizer = load_model("base")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    rows = record()["results"]["tasks"]
    found = simple_evaluate(model=lm, tasks=list(rows), task_manager=manager, bootstrap_iters=0)["results"]
    for name, row in rows.items():
        assert row["scores"]["base"]["value"] == found[name][row["metric"]]


def test_a_chat_template(here, capsys):
    assert run("base", "--apply_chat_template", tasks="arc_easy") == 0
    assert run("plain", "--apply_chat_template", tasks="arc_easy") == 2
    assert "plain has no chat template: leave --apply_chat_template out" in capsys.readouterr().err


def test_a_model_that_fails_a_task_is_named(here, capsys):
    assert run("base", "--max_length", "300", "--limit", "1", tasks="gsm8k,arc_easy") == 0
    assert "base: gsm8k: 1 item," in capsys.readouterr().err  # cut prompts are told of in the report
    assert "lost their beginning in gsm8k" in Path("runs/evaluate/report.md").read_text()
    assert run("base", "--max_length", "200", tasks="gsm8k,arc_easy") == 0
    missing = record()["results"]["missing"]
    assert [(one["task"], one["label"]) for one in missing] == [("gsm8k", "base")]
    assert "max tokens to generate" in missing[0]["why"]


# --- what a page shows -----------------------------------------------------------------------------------------------


def shown(found):
    from lfu.report.evaluate_view import view

    return view(found)


def test_the_report(scored):
    assert run("one", "two", tasks=f"{TWO},truthfulqa_mc2") == 0
    text, page = Path("runs/evaluate/report.md").read_text(), Path("runs/evaluate/index.html").read_text()
    for words in ("Math, partial", "not asked for: gsm8k, asdiv", "Average rank over Math (mathqa alone)", "McNemar"):
        assert words in text
        assert words.replace("'", "&#39;") in page
    with_lost = [name for name, lost in record()["results"]["lost"]["one"].items() if lost["items"]]
    for name in with_lost:
        assert f"{name}: what one lost" in text


def test_a_verdict_says_no_more_than_the_intervals():
    def change(low, value, high):
        return {"items": 500, "before": 0.5, "after": 0.5 + value, "net": {"value": value, "low": low, "high": high}}

    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    rows = {
        name: {"category": "A", "metric": "acc,none", "items": 500, "fewshot": 0, "truncated": {"old": 0, "new": 0},
               "scores": {"old": score, "new": score}}
        for name in ("up", "down", "same", "same too")
    }  # fmt: skip
    changes = {
        "up": change(0.01, 0.05, 0.09), "down": change(-0.09, -0.05, -0.01),
        "same": change(-0.01, 0.0, 0.01), "same too": change(0.0, 0.05, 0.1),
    }  # fmt: skip
    category = {
        "tasks": list(rows),
        "missing": [],
        "not_asked": [],
        "complete": True,
        "scores": {"old": 0.5, "new": None},
    }
    results = {
        "tasks": rows, "categories": {"A": category}, "missing": [], "ranks": None, "ranked_over": {}, "base": "old",
        "forgetting": {"new": changes}, "lost": {"new": {}},
    }  # fmt: skip
    found = shown({"results": results, "models": {"old": {}, "new": {}}, "settings": {}})
    assert list(found.verdict) == [
        "new against old: higher on up (+5.0 [+1.0, +9.0] points); lower on down (-5.0 [-9.0, -1.0] points); "
        "no measurable difference on same and same too."
    ]


def test_few_items_are_called_few(scored, capsys):
    assert run("base", tasks="arc_easy") == 0
    assert "With 4 items the interval of a score reaches 50 points" in " ".join(capsys.readouterr().out.split())


# --- wrong inputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/at/all"], "model nowhere/at/all does not exist"),
        (["base", "base"], "two models are called 'base'"),
        (["base=two"], "the label base is the untouched model's"),
        (["plain", "--base", "nowhere/at/all"], "model nowhere/at/all does not exist"),
        (["base", "--data_dir", "nowhere"], "--data_dir nowhere: no such folder"),
        (["base", "--categories", "papr"], "categories papr: no such file, and none of the shipped ones"),
        (["base", "--tasks", ","], "--tasks: name at least one task"),
        (["base", "--tasks", "arc,arc"], "arc is named twice"),
        (["base", "--tasks", "piqa"], "no task can be run (piqa: data/piqa/validation.jsonl is not there)"),
        (["base", "--limit", "0"], "argument --limit: must be a whole number from 1, got '0'"),
        (["base", "--limit", "many"], "argument --limit: must be a whole number from 1"),
        (["base", "--num_fewshot", "-1"], "must be a whole number from 0"),
        (["base", "--output_dir", "data/gsm8k/test.jsonl"], "is a file: choose another --output_dir"),
        (["base", "--taks", "arc"], "unrecognized arguments: --taks arc"),
        ([], "required: MODEL"),
    ],
)
def test_wrong_inputs(here, words, message, capsys):
    before = sorted(Path().rglob("*"))
    assert main(["evaluate", *words] if "--data_dir" in words else ["evaluate", *words, "--data_dir", "data"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("lfu evaluate: error: ")
    assert message in err[-1]
    assert len([line for line in err if "error" in line]) == 1
    assert sorted(Path().rglob("*")) == before


def test_a_flag_that_would_do_nothing_is_refused(here, capsys):
    assert main(["evaluate", "base", "--allow_hub"]) == 2
    assert "--allow_hub goes with --data_dir" in capsys.readouterr().err


def test_a_broken_row_is_named_before_any_model_is_loaded(here, monkeypatch, capsys):
    from lfu.model import loading as models

    monkeypatch.setattr(models, "load_model", None)
    write_local(here / "mine")
    Path("mine/mathqa/test.jsonl").write_text('{"question": "a"}\n')
    assert main(["evaluate", "base", "--data_dir", "mine", "--tasks", "mathqa"]) == 2
    assert "mine/mathqa/test.jsonl line 1: no column 'choices', which mathqa needs" in capsys.readouterr().err


def test_without_the_harness(here, monkeypatch, capsys):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    assert run("base") == 2
    assert "lfu evaluate needs lm-eval: pip install 'lfu-tuning[eval]'" in capsys.readouterr().err


def test_a_tokenizer_alone_is_no_model(here, capsys):
    byte_tokenizer().save_pretrained("tokenizer")
    assert run("tokenizer") == 2
    assert "tokenizer has no config.json" in capsys.readouterr().err
