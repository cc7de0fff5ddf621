"""How far ahead of SFT: against cases that can be told by hand; what chooses and what reports are kept apart."""

from __future__ import annotations

import json
from dataclasses import replace

import bed
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from testbed.frontier import AXES, ahead, lead, mean, over_bases
from testbed.report import Study, surface
from testbed.setting import Setting
from testbed.skills import OTHERS

PERCENT = st.floats(0, 100)
POINT = st.tuples(PERCENT, PERCENT, PERCENT).map(np.array)
SURFACE = st.lists(POINT, min_size=1, max_size=6).map(np.array)


@given(SURFACE, st.floats(-20, 20), st.data())
@settings(max_examples=60, deadline=None)
def test_lead_is_in_points_and_not_above_zero_on_a_mixture(surface, shift, data):
    weights = np.array(data.draw(st.lists(st.floats(0.01, 1), min_size=len(surface), max_size=len(surface))))
    mixture = weights @ surface / weights.sum()
    assert lead(mixture + shift, surface) == pytest.approx(lead(mixture, surface) + shift, abs=1e-6)
    assert lead(mixture, surface) <= 1e-6  # SFT is never ahead of itself; another mixture may be
    assert lead(surface.max(0) + 1, surface) >= 1 - 1e-6


def test_ahead_on_one_axis_at_equal_values_of_the_others():
    surface = np.array([[0.0, 0.0, 100.0], [80.0, 60.0, 40.0]])
    point = np.array([40.0, 30.0, 75.0])  # half of the way: 40, 30, 70
    assert ahead(point, surface, 2) == pytest.approx(5)
    assert ahead(np.array([40.0, 20.0, 75.0]), surface, 0) == pytest.approx(40 - 80 * 25 / 60)
    assert np.isnan(ahead(point, surface, 0))  # where SFT keeps 75 it has 25 reworded, not 30
    assert lead(point, surface) > 0
    assert np.isnan(ahead(np.array([81.0, 0.0, 0.0]), surface, 2))
    assert str(over_bases(lambda v: ahead(v, surface, 2), np.array([[81.0, 0, 0]] * 2))) == "beyond SFT"


@given(st.lists(PERCENT, min_size=2, max_size=30))
def test_the_jackknife_of_a_mean_is_its_standard_error(values):
    from scipy.stats import sem, t

    found = mean(values)
    assert found.value == pytest.approx(np.mean(values))
    assert found.half == pytest.approx(t.ppf(0.975, len(values) - 1) * sem(values), abs=1e-6)


def made_up(bases: int = 6) -> Study:
    """SFT trades the target for the rest; a pull of 0.1 keeps 10 points more on each base, 0.2 keeps 5 more."""
    values = {}
    for setting, point in {
        Setting(16, 60, 1e-4): (20, 10, 90),
        Setting(16, 60, 1e-3): (80, 70, 30),
        Setting(16, 60, 1e-3, pull=0.1): (80, 70, 40),
        Setting(16, 60, 1e-3, pull=0.2): (80, 70, 35),
        Setting(16, 60, 1e-3, rho=0.1): (80, 70, 30),
    }.items():
        more = {name: np.full((bases, 2), 1.0) for name in ("nll_train", "moved", "rank")}
        values[setting] = {a: np.full((bases, 2), float(v)) for a, v in zip(AXES, point)} | more
    return Study(values, np.tile([0.0, 0.0, 100.0], (bases, 1)), choosing=2, machine="none")


def test_some_bases_choose_and_the_others_report():
    study = made_up()
    best, other = (Setting(16, 60, 1e-3, pull=w) for w in (0.1, 0.2))
    assert study.methods(16) == ["L2-SP", "SAM"]
    assert study.chosen(16, "L2-SP") == best
    whole, each = study.held(best)
    assert each[2].value == pytest.approx(10)
    assert whole.value > 0
    assert whole.half == pytest.approx(0, abs=1e-6)
    assert study.held(Setting(16, 60, 1e-3, rho=0.1))[0].value == pytest.approx(0, abs=1e-6)
    study.values[other]["others"][study.choosing :] = 99  # better only where nothing is chosen
    assert study.chosen(16, "L2-SP") == best
    study.values[best]["others"][: study.choosing] = 0  # worse only where nothing is reported
    assert study.held(best)[1][2].value == pytest.approx(10)
    assert study.chosen(16, "L2-SP") == other


def test_a_method_is_held_to_sft_of_all_weights_and_of_a_lora_whatever_it_trains():
    study = made_up()
    lora, all_weights = Setting(16, 60, 1e-3, lora=True), Setting(16, 60, 1e-3, pull=0.1)
    pull = replace(lora, pull=0.1)
    values = study.values[Setting(16, 60, 1e-3)]
    study.values[pull] = values | {"others": values["others"] + 20}
    assert study.held(pull)[1][2].value == pytest.approx(20)  # no SFT of a LoRA to hold it to
    study.values[lora] = values | {"others": values["others"] + 15}
    assert study.held(pull)[1][2].value == pytest.approx(5)
    assert study.held(all_weights)[1][2].value == pytest.approx(-5)
    assert study.held(lora)[1][2].value == pytest.approx(15)  # SFT of all weights alone
    study.values[lora] = values | {"others": values["others"] - 15}
    assert study.held(pull)[1][2].value == pytest.approx(20)
    assert study.methods(16) == ["L2-SP", "SAM", "L2-SP, LoRA", "SFT, LoRA"]
    assert "SFT, LoRA:\n\n| rows | updates | 0.001 |" in surface(study)


def keep(study: Study, folder) -> None:
    """As `bed.py run` leaves it."""
    bases, draws = len(study.untouched), next(iter(study.values.values()))["target"].shape[1]
    skills = {name: [0.0 if name in AXES else 100.0] * bases for name in ("target", "reworded", *OTHERS)}
    lines = [{"bases": skills, "draws": draws, "machine": "none"}] + [
        {"setting": s.changed(), "runs": {name: v.flatten().tolist() for name, v in runs.items()}}
        for s, runs in study.values.items()
    ]
    (folder / bed.RUNS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_tables_and_picture_of_a_folder(tmp_path, capsys):
    keep(made_up(), tmp_path)
    assert bed.main(["report", str(tmp_path)]) == 0
    table = (tmp_path / "methods.md").read_text()
    assert "chosen on 2 base models, reported on 4 others; 2 comparisons" in table
    assert "L2-SP | pull 0.1, rate 0.001, 60 updates | 2 | 80.0 | 70.0 | 40.0 |" in table
    balanced = (tmp_path / "balanced.md").read_text()
    assert "L2-SP | pull 0.1, rate 0.001, 60 updates | 2 | 80.0 | 70.0 | 40.0 | +3.3 ± 0.0 | +0.0 ± 0.0 |" in balanced
    assert "SFT | rate 0.001, 60 updates | 2 | 80.0 | 70.0 | 30.0 |  |" in balanced
    assert "+10.0 ± 0.0 (6 of 6)" in (tmp_path / "paired.md").read_text()
    assert "| 16 | 60 | 20.0, 10.0, 90.0 | 80.0, 70.0, 30.0 |" in (tmp_path / "surface.md").read_text()
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_plain_sft_may_be_taken_from_another_study_of_the_same_bases(tmp_path):
    """On the bases and draws that both have; a setting that is here stays, and no other method comes along."""
    whole, few, rate = made_up(), made_up(bases=3), Setting(16, 60, 1e-4)
    for number, values in enumerate(whole.values[rate]["target"]):
        values[:] = number, 50
    few.values = {s: {n: v[:, :1] for n, v in few.values[s].items()} for s in (Setting(16, 60, 1e-3, rho=0.1),)}
    folders = [tmp_path / name for name in ("whole", "few")]
    for study, folder in zip((whole, few), folders):
        folder.mkdir()
        keep(study, folder)
    assert bed.main(["report", str(folders[1]), "--sft", str(folders[0])]) == 0
    table = (folders[1] / "paired.md").read_text()
    assert "| 16 | SFT | rate 0.0001, 60 updates | 1.0 |" in table  # the mean of 0, 1, 2
    assert "SAM | rho 0.1, rate 0.001, 60 updates | 80.0 | 70.0 | 30.0" in table
    assert "L2-SP" not in table
    lora = Setting(16, 60, 1e-3, lora=True)
    few.values[lora] = {name: v + 1 for name, v in few.values[Setting(16, 60, 1e-3, rho=0.1)].items()}
    whole.take_sft(few)
    assert {v.shape for runs in whole.values.values() for v in runs.values()} == {(3, 1)}
    assert (len(whole.untouched), whole.choosing) == (3, 1)
    assert whole.lead(Setting(16, 60, 1e-3, rho=0.1)).value == pytest.approx(-1)  # the LoRA is 1 better
    few.untouched += 5
    with pytest.raises(SystemExit, match="other base models"):
        few.take_sft(whole)


def test_methods_are_told_apart_by_what_they_do_and_not_by_how_strongly():
    plain = Setting(16, 60, 1e-3)
    assert replace(plain, rate=1e-4, steps=3).method == "SFT"
    pulls = [replace(plain, pull=w, rate=r) for w in (0.1, 0.2) for r in (1e-3, 2e-3)]
    assert len({s.method for s in pulls}) == 1
    assert len({s.place for s in pulls}) == 4
    apart = [
        plain, pulls[0], replace(plain, share=0.1), replace(plain, pull=0.1, pull_kind="fisher"),
        replace(plain, lora=True),
        replace(plain, auxiliary="own"), replace(plain, auxiliary="lora"), replace(plain, auxiliary="own", alpha=-0.1),
        replace(plain, auxiliary="own", pull=0.1), replace(plain, anchor=1.0), replace(plain, wise=0.5),
    ]  # fmt: skip
    assert len({s.method for s in apart}) == len(apart)
