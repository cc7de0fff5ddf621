"""`lfu sweep`: grids, bisection, its presets, and every wrong input that it must catch."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_study import QUICK, records, results, run

from lfu.study.presets import shipped

pytestmark = pytest.mark.usefixtures("quick_pictures")


def sweep(model, *flags):
    return run(model, *flags, verb="sweep")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("", "nothing to sweep"),
        ("--param alpha", "--param: must be NAME=V,V"),
        ("--param alpha=1,1", "--param: must be NAME=V,V"),
        ("--param alhpa=1,2", "Did you mean alpha?"),
        ("--method sft --param alpha=1,2", "LfU's own"),
        ("--param seed=1,2", "set by the study itself"),
        ("--param alpha=0.1,-1", "lfu alpha=-1: alpha must be a finite number > 0"),
        ("--bisect alpha=3", "--bisect: must be NAME=LOW:HIGH"),
        ("--bisect alpha=3:1", "0 < LOW < HIGH"),
        ("--bisect learning_rate=1:3", "plain SFT has it too"),
        ("--bisect alpha=0.1:1 --learning_rates 1,2", "--bisect goes with one learning rate"),
        ("--param data_limit=90,900", "data_limit must be a whole number from 1 to the 28 rows"),
        ("--methods sft", "unknown flag --methods"),
    ],
)
def test_mistakes_give_one_line_and_leave_nothing(here, model, capsys, flags, says):
    assert sweep(model, flags) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.strip().splitlines()[-1].startswith("lfu sweep: error: ")
    assert [path.name for path in here.iterdir()] == ["rows.jsonl"]


def test_a_grid_of_two(here, model):
    assert sweep(model, f"--param alpha=0.01,0.1 --param lam=5,9 {QUICK}") == 0
    found = results()
    assert len(found["settings"]) == 5
    report = Path("out/report.md").read_text()
    assert "sweep-steps.png" in report
    values = found["modes"]["steps"]["values"]["loss"]
    assert f"lfu alpha=0.1 lam=9 {values['lfu alpha=0.1 lam=9']['mean']:.3f}" in report


def test_a_bisection_finds_where_training_collapses(here, model):
    """A learning rate at which LfU moves the tiny model at random, and an alpha for which lambda alone decides."""
    assert (
        sweep(model, f"--bisect alpha=0.001:1000 --lam 5 --bisect_steps 2 --learning_rate 3e-2 {QUICK} --max_steps 8")
        == 0
    )
    found = results()["collapse"]
    tried = {float(value): one for value, one in found["tried"].items()}
    assert {0.001, 1000.0} <= set(tried)
    for one in tried.values():
        assert one["collapsed"] == (one["loss"] is None or one["loss"] > found["untouched"])
    assert not tried[found["holds"]]["collapsed"]
    assert tried[found["collapses"]]["collapsed"]
    report = Path("out/report.md").read_text()
    assert f"{found['holds']:g} (holds) and {found['collapses']:g} (collapses)" in report
    (sft,) = (r for r in records().values() if r["label"] == "sft")
    assert found["sft"] == sum(sft["measures"]["validation"]["nll"]) / sum(sft["measures"]["validation"]["tokens"])
    assert f"plain SFT: {found['sft']:.3f}" in report


@pytest.mark.parametrize("name", [name for name, path in shipped().items() if "verb: sweep" in path.read_text()])
def test_presets(shelf, model, name, capsys):
    more = {"alpha-threshold": "--bisect_steps 1"}.get(name, "")
    assert sweep(model, f"--preset {name} {QUICK} {more}") == 0
    found = results()
    assert found["whole"]
    assert {r["state"] for r in found["runs"]} == {"finished"}
    labels = {
        "steps": {"sft", *(f"lfu ascent_steps={n}" for n in (1, 2, 4))},
        "consistency": {"sft", *(f"lfu consistency={kind}" for kind in ("mse", "cosine", "contrastive", "logit_kl"))},
        "sizes": {f"{method} data_limit=16" for method in ("sft", "lfu")},  # of 16, 64, 256
    }
    if name == "sizes":
        assert "lfu data_limit=64 is left out: 28 rows are left for training" in capsys.readouterr().err
        assert "Left out are sizes above the 28 rows that are left for training: 64, 256." in found["same"]["rows"]
    if name in labels:
        assert set(found["settings"]) == labels[name]
        balanced = {label for label, one in found["settings"].items() if one["differs"].get("lam") == "auto"}
        assert balanced == {label for label in labels[name] if label.startswith("lfu")}
    else:
        assert {"0.05", "5"} <= set(found["collapse"]["tried"])
