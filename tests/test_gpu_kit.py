"""The kit for a GPU, rehearsed on a CPU: a tiny model, few rows, the first runs of the list."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from fewrows import careful, runs, train, work
from fewrows.rows import SIZES
from fewrows.tables import tables
from tiny_folder import save_model

KIT = Path(__file__).parent.parent / "scripts" / "gpu"


def rows_file(folder: Path) -> Path:
    worded = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(8)]
    choice = [{"question": "Which is wet?", "choices": ["sand", "water"], "answer": 1}]
    rows = {name: choice if name in ("arc_easy", "mmlu") else worded[:2] for name in SIZES}
    rows |= {"train": worded, "lambada": [{"question": "The sea is", "answer": "wet"}]}
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def test_no_run_is_listed_twice_and_every_draw_has_every_method():
    listed = runs.all_runs()
    assert len(set(listed)) == len(listed)
    assert {(run.rows, run.draw) for run in listed if run.study == "few"} == {
        (rows, draw) for rows in runs.LENGTHS for draw in range(6)
    }
    counts = Counter((run.rows, run.draw, run.theta) for run in listed if run.study == "few")
    assert len(set(counts.values())) == 1


def test_every_kind_of_run_leaves_its_record_and_two_processes_share_the_list(tmp_path, monkeypatch):
    kinds = {(run.study, run.theta, run.method, run.lam): run for run in runs.all_runs()}
    listed = [replace(run, updates=min(run.updates, 2)) for run in kinds.values()]
    monkeypatch.setattr(work, "all_runs", lambda: listed)
    monkeypatch.setattr(work, "measured", lambda *a, **kw: dict(validation=1.0, test=1.0, dolly=1.0, lambada=1.0,
        wordings={"a": 1.0, "b": 2.0}, arc_easy_sure=0.5, mmlu_sure=0.5))  # fmt: skip
    flags = ["--rows", str(rows_file(tmp_path)), "--claims", str(tmp_path / "claims"), "--device", "cpu", "--model",
             save_model(tmp_path / "model"), "--seconds", "600", "--out", str(tmp_path / "records.jsonl")]  # fmt: skip
    work.claimed(tmp_path, 0)
    work.main(flags)
    work.main(flags)  # finds everything taken
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [one.get("failed") for one in records] == [None] * len(listed)
    assert {(one["study"], one["theta"], one["method"], one["lam"]) for one in records} == set(kinds)
    assert all(one["gradient_ratio"] > 0 for one in records if one["method"] == "lfu")
    text = tables(records)
    assert f"{len(listed)} runs, 0 failed" in text
    assert "| few | 256 | full | lfu | auto |" in text


def test_l2sp_pulls_an_adapter_by_the_square_of_what_it_adds():
    import torch
    from tiny import tiny_model

    model = tiny_model(theta="lora")
    layers = [module for module in model.modules() if "default" in getattr(module, "lora_A", {})]
    added = sum((module.get_delta_weight("default") ** 2).sum() for module in layers)
    torch.testing.assert_close(train.adapter_distance(model).double(), added)


def test_what_is_chosen_by_default_runs_beside_plain_sft_and_goes_on(tmp_path, monkeypatch):
    worded = json.loads(rows_file(tmp_path).read_text())["train"]
    rows = dict.fromkeys(("train", "validation", "test", "gsm8k"), worded) | {"lambada": [{"text": "The sea is wet."}]}
    monkeypatch.setattr(careful, "picked", lambda data, task: rows)
    out = tmp_path / "records.jsonl"
    flags = [".", str(out), "--rows", "4", "--draws", "2", "--rates", "1e-2", "--share", "0.9", "--device", "cpu"]
    flags += ["--model", save_model(tmp_path / "model")]
    careful.main([*flags, "--seconds", "0"])
    assert not out.exists()
    for part in ("1/2", "2/2"):
        careful.main([*flags, "--part", part])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(one["method"], one["weight"], one["updates"]) for one in records] == [
        ("start", 0.0, 0), *[("sft", 0.0, 15)] * 2, *[("l2sp", 0.9, 15)] * 2
    ]  # fmt: skip
    start, sft, l2sp = (records[n]["test"] for n in (0, 1, 3))
    assert sft < l2sp < start  # learned; and held back, which a share of 0.9 does
    before = out.read_text()
    careful.main(flags)
    assert out.read_text() == before
    assert "| careful model | 4 | lora | l2sp |" in tables(records)


def test_measures_of_an_untouched_model(tmp_path):
    rows, out, model = rows_file(tmp_path), tmp_path / "r.jsonl", save_model(tmp_path / "model")
    flags = ["--claims", str(tmp_path / "claims"), "--device", "cpu", "--seconds", "600", "--every", "1000"]
    work.main(["--rows", str(rows), "--out", str(out), "--model", model, *flags])
    (record,) = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert record["study"] == "start"
    assert record["wordings"]["bare"] == pytest.approx(record["test"])
    assert 0 < record["arc_easy_sure"] < 1
    assert record["exact"] == 0


@pytest.mark.parametrize("script", ["one.sh", "two.sh", "bed.sh", "setup.sh", "pack.sh"])
def test_scripts_are_sound_bash(script):
    assert subprocess.run(["bash", "-n", KIT / script]).returncode == 0


@pytest.mark.soak
def test_both_commands_end_by_themselves(tmp_path):
    more = dict(KIT=str(tmp_path / "kit"), DEVICE="cpu", PYTHON=sys.executable, PATH="/usr/bin:/bin")
    one = more | dict(OUT=str(tmp_path / "one"), SIZE="tiny", WORKERS="1", TESTS="test_sft and full")
    two = more | dict(OUT=str(tmp_path / "two"), MODEL=save_model(tmp_path / "model"), EVERY="1000",
                      ROWS=str(rows_file(tmp_path)), WORKERS="1", SECONDS_ALL="90")  # fmt: skip
    for script, env in (("one.sh", one), ("two.sh", two)):
        subprocess.run(["bash", KIT / script], env=env, check=True, timeout=400)
    parts = (tmp_path / "one" / "parts.txt").read_text()
    assert "tests: exit 0" in parts
    assert "step_cost: exit 0" in parts
    assert json.loads((tmp_path / "two" / "records.jsonl").read_text())["study"] == "start"
