"""`lfu train --forgetting_budget`: any method is measured while it trains, with the curve in the terminal."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from forgetting.runs import few

from lfu.cli import main
from lfu.data import probes

SHORT = (
    "--output_dir out --max_steps 4 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --report_to none "
    "--gradient_checkpointing false --forgetting_share 1 --forgetting_every 2"
)


@pytest.fixture(autouse=True)
def few_items(monkeypatch, few_pictures):
    few(monkeypatch.setattr)


def train(model: str, flags: str) -> int:
    return main(shlex.split(f"train --model {model} --data rows.jsonl {SHORT} {flags}"))


@pytest.mark.parametrize("method", ["sft", "lfu", "gem", "sam", "ema"])
def test_the_curve_is_printed_and_the_probe_shows_it_again(here, model, capsys, method):
    assert train(model, f"--method {method} --forgetting_budget 0.5 --learning_rate 0.01") == 0
    out = capsys.readouterr().out
    first, *_, last = re.findall(r"^step .*/4 .*", out, re.MULTILINE)
    assert "forgotten - " in first  # not measured yet
    assert re.search(r"forgotten [+-]\d+\.\d%", last)
    assert "Forgetting" in out
    assert all(len(line) <= 80 for line in out.split("Forgetting\n")[-1].splitlines()[:6])
    record = json.loads(Path("out/forgetting/record.json").read_text())
    assert record["results"]["curve"][-1]["step"] == 4
    assert record["results"]["budget"] == {"questions": 0.5, "prose": 0.5}
    assert main(["probe", "forgetting", "out", "--output_dir", "probed"]) == 0
    assert "as measured during training" in capsys.readouterr().err
    assert json.loads(Path("probed/record.json").read_text()) == record


def test_a_run_that_breaks_ends_with_its_curve(here, model, capsys):
    assert train(model, "--method sft --forgetting_budget 0.5 --learning_rate 1e30") == 0
    out = capsys.readouterr().out
    assert re.search(r"nan .* over$", out, re.MULTILINE)


def test_weights_that_are_not_those_that_were_measured_are_measured_anew(here, model, capsys, monkeypatch):
    for name in ("general_knowledge", "plain_text"):
        usual = getattr(probes, name)
        monkeypatch.setattr(probes, name, lambda usual=usual: usual()[:24])
    assert train(model, "--method sft --forgetting true --learning_rate 0.01") == 0
    assert main(shlex.split(f"train --model {model} --data rows.jsonl {SHORT.split('--forgetting')[0]} --method sft "
                            "--overwrite_output_dir true --learning_rate 0.02")) == 0  # fmt: skip
    capsys.readouterr()
    assert main(["probe", "forgetting", "out", "--output_dir", "probed"]) == 0
    assert "is of other weights than out has now" in capsys.readouterr().err
    assert "curve" not in json.loads(Path("probed/record.json").read_text())["results"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--forgetting_budget much", "give a number above 0"),
        ("--forgetting_budget poems=1", "'poems' is not measured"),
        ("--forgetting_stop true", "--forgetting_stop true needs a budget, such as --forgetting_budget 0.02"),
        ("--forgetting_keep_best true --forgetting_budget 0.1", "set --load_best_model_at_end true"),
        ("--forgetting_share 3", "--forgetting_share must be above 0 and at most 1, got 3.0"),
        ("--forgetting_every 0", "--forgetting_every must be a whole number from 1, got 0"),
        ("--forgetting_files nowhere.jsonl", "nowhere.jsonl: can't be read"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(here, model, capsys, flags, told):
    assert train(model, flags) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1
    assert not Path("out").exists()
