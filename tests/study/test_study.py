"""A whole small study, looked at from all sides; then what goes wrong, and what happens when it is started again."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from contextlib import nullcontext
from math import exp
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pictures import one_of_each_kind
from tiny_study import records, results, run, state, write_questions

from lfu import LfUConfig
from lfu.cli import main
from lfu.cli.arguments import ModelArguments, parse
from lfu.cli.study_flags import flags_of
from lfu.evaluation.record import machine, weights_hash
from lfu.model.loading import load_model
from lfu.report.compare_view import view
from lfu.study import keys, processes
from lfu.study import run as study_run
from lfu.study.cluster import work_on_cluster
from lfu.study.folder import Place
from lfu.study.measure import Part
from lfu.study.plan import UNTOUCHED
from lfu.study.processes import work_in_processes
from lfu.study.study import Study
from lfu.support.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_pictures")  # of each kind one of the whole study, below, is rendered
KEPT_FILES = {"config.json", "record.json", "log.jsonl", "curve.png", "run.lock"}


def test_the_untouched_model_is_asked_as_the_tuned_ones(model, tmp_path):
    """With the template and the end that training is told to use, whatever its own tokenizer has."""
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}<|pad|>{% endfor %}")
    flags = ["--model", model, "--data", "-", "--chat_template_path", str(template), "--eos_token", "<|pad|>"]
    config, arguments, *_ = parse([*flags, "--output_dir", str(tmp_path / "out"), "--report_to", "none"])
    some: Any = SimpleNamespace(configs=lambda run: (config, arguments))
    _, tokenizer = study_run._loaded(some, UNTOUCHED, Place(tmp_path, "key", "session"))
    assert tokenizer.chat_template == template.read_text()
    assert tokenizer.eos_token == "<|pad|>"


@pytest.fixture(scope="module")
def study(model, tmp_path_factory) -> SimpleNamespace:
    """Three settings, two of them one algorithm; two seeds, two learning rates, equal steps and equal time."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_questions(Path("rows.jsonl"))
        one_of_each_kind(patch.setattr)
        code = run(model, "--methods sft,lfu:lam=0,lfu --seeds 2 --learning_rates 1e-2,3e-2 --equal both")
    out = folder / "out"
    return SimpleNamespace(
        folder=folder, out=out, code=code, results=results(out), records=records(out), model=model,
        record=json.loads((out / "record.json").read_text()), report=(out / "report.md").read_text(),
    )  # fmt: skip


def by_label(study, mode="steps"):
    """label -> seed -> the run's record, by the folders that the report names."""
    steps = {label: one["steps"][mode] for label, one in study.results["settings"].items()}
    found: dict = {}
    for run_ in study.results["runs"]:
        label = run_["label"]
        chosen = study.results["search"].get(label, {}).get("chosen")
        if run_["level"] == "full" and label != "untouched" and run_["steps"] == steps[label]:
            assert run_["learning_rate"] == chosen
            found.setdefault(label, {})[run_["seed"]] = study.records[Path(run_["folder"]).name]
    return found


def test_it_ends_well(study):
    assert study.code == 0
    assert study.results["whole"]
    assert {run_["state"] for run_ in study.results["runs"]} == {"finished"}
    assert {path.name for path in study.out.iterdir()} >= {"index.html", "report.md", "record.json", "data", "runs"}


def test_two_names_of_one_algorithm_tie_exactly(study):
    found = by_label(study)
    for seed in (0, 1):
        assert found["sft"][seed]["model"]["weights"] == found["lfu lam=0"][seed]["model"]["weights"]
        assert found["sft"][seed]["measures"] == found["lfu lam=0"][seed]["measures"]
    mode = study.results["modes"]["steps"]
    for key, each in mode["against_sft"].items():
        assert {each["lfu lam=0"][end] for end in ("value", "low", "high")} == {0.0}, key
        assert mode["values"][key]["lfu lam=0"] == mode["values"][key]["sft"]
    assert mode["ranks"]["average"]["sft"] == mode["ranks"]["average"]["lfu lam=0"]
    assert found["lfu"][0]["model"]["weights"] != found["sft"][0]["model"]["weights"]


def test_the_runs_of_a_seed_differ_by_the_method_alone(study):
    configs = {
        (c["label"], c["seed"], c["learning_rate"], c["steps"]): c["config"]
        for c in (json.loads(path.read_text()) for path in study.out.glob("runs/*/config.json"))
    }
    for (label, seed, rate, steps), config in configs.items():
        if label == "untouched" or ("sft", seed, rate, steps) not in configs:
            continue
        other = configs["sft", seed, rate, steps]
        listed = set(study.results["settings"][label]["differs"])
        assert {name for name in config if config[name] != other[name]} == listed, label
    assert study.results["settings"]["lfu"]["differs"] == {"method": "lfu", "lam": "auto"}


def test_the_search_was_on_validation_rows_alone(study):
    search = study.results["search"]
    assert set(search) == {"sft", "lfu lam=0", "lfu"}
    for one in search.values():
        assert set(one["losses"]) == {"1e-2", "3e-2"}
        assert one["chosen"] == min(one["losses"], key=one["losses"].get)
        assert one["edge"] == {"1e-2": "lowest", "3e-2": "highest"}[one["chosen"]]
        assert f"The {one['edge']} learning rate that was tried is the best one for " in study.report
    losers = [r for r in study.results["runs"] if r["level"] == "search"]
    assert len(losers) == 3
    for loser in losers:
        files = {path.name for path in (study.out / loser["folder"]).iterdir()}
        assert "part-validation.json" in files
        assert not files & {"record.json", "part-gain.json", "model"}


def test_rows_are_used_for_one_thing_each(study):
    data = {
        name: (study.out / "data" / f"{name}.jsonl").read_text().splitlines()
        for name in ("train", "validation", "test")
    }
    assert [len(data[name]) for name in ("train", "validation", "test")] == [28, 8, 8]
    assert len({row for rows in data.values() for row in rows}) == 44
    same = study.results["same"]
    assert (same["training rows"], same["validation rows"], same["test rows"]) == (28, 8, 8)


def test_equal_time_gives_each_the_steps_that_sfts_time_allows(study):
    modes = study.results["modes"]
    seconds = {label: seeds[0]["cost"]["step_seconds"] for label, seeds in by_label(study).items()}
    for label, one in modes["time"]["cost"].items():
        assert one["steps"] == max(1, round(3 * seconds["sft"] / seconds[label]))
    assert modes["time"]["cost"]["sft"]["steps"] == 3


# --- the report -----------------------------------------------------------------------------------------------------


def table(report: str, caption: str) -> dict[str, list[str]]:
    """First cell -> the other cells of the first table below a caption."""
    lines = report[report.index(caption) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| ---"))
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[start + 1 : lines.index("", start)]]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}


def loss(record, part="gain"):
    return sum(record["measures"][part]["nll"]) / sum(record["measures"][part]["tokens"])


def share(flags):
    return 100 * fmean(map(float, flags))


def test_the_reports_figures_are_the_records(study):
    """Recomputed here from the runs' own records."""
    shown = table(study.report, "Results, mean ± standard deviation over 2 seeds")
    differences = table(study.report, "Difference to plain SFT")
    assert list(shown) == ["untouched", "sft", "lfu lam=0", "lfu"]
    for label, seeds in by_label(study).items():
        losses = [loss(record) for record in seeds.values()]
        assert shown[label][1] == f"{fmean(losses):.3f} ± {stdev(losses):.3f}"
        # a third of what should be kept has chosen, the rest is reported
        kept = [r["measures"]["kept"]["knowledge"]["correct"] for r in seeds.values()]
        knowledge = [share(c for i, c in enumerate(each) if i % 3) for each in kept]
        assert shown[label][3] == f"{fmean(knowledge):.1f} ± {stdev(knowledge):.1f}"
        right = [share(record["measures"]["match"]["correct"]) for record in seeds.values()]
        assert shown[label][2] == f"{fmean(right):.1f} ± {stdev(right):.1f}"
        prose = [reported_nll(record["measures"]["kept"]["prose"]) for record in seeds.values()]
        assert shown[label][4] == f"{exp(fmean(prose)):.2f} ± {stdev(map(exp, prose)):.2f}"
        wording = [stdev(map(nll_of, record["measures"]["prompts"].values())) for record in seeds.values()]
        assert shown[label][6] == f"{fmean(wording):.3f} ± {stdev(wording):.3f}"
        reworded = [fmean(map(nll_of, record["measures"]["prompts"].values())) for record in seeds.values()]
        assert shown[label][5] == f"{fmean(reworded):.3f} ± {stdev(reworded):.3f}"
        noise = [cosine(record["measures"]["noise"]) for record in seeds.values()]
        assert shown[label][7] == f"{fmean(noise):.4f} ± {stdev(noise):.4f}"
        if label in differences:
            change = fmean(losses) - fmean(loss(r) for r in by_label(study)["sft"].values())
            assert float(differences[label][0].split("<br>")[0]) == pytest.approx(change, abs=6e-4)
    untouched = next(r for r in study.records.values() if r["label"] == "untouched")
    assert shown["untouched"][1] == f"{loss(untouched):.3f}"


def nll_of(scores) -> float:
    return sum(scores["nll"]) / sum(scores["tokens"])


def reported_nll(scores) -> float:
    """Of the items that don't choose."""
    nll, tokens = ([v for i, v in enumerate(scores[name]) if i % 3] for name in ("nll", "tokens"))
    return sum(nll) / sum(tokens)


def cosine(noise) -> float:
    """Mean over layers and tokens."""
    rows = [fmean(layers) for layers in zip(*noise["cosine"])]
    return sum(c * t for c, t in zip(rows, noise["tokens"])) / sum(noise["tokens"])


def test_the_ranks_are_those_of_the_figures_shown(study):
    """By category: learned (loss, solved), knowledge, language (prose), steady (reworded, wording, noise)."""
    shown = table(study.report, "Results, mean ± standard deviation over 2 seeds")
    columns = [(1, -1), (2, 1), (3, 1), (4, -1), (5, -1), (6, -1), (7, 1)]  # place, and whether more is better
    value = lambda label, place: float(shown[label][place].split(" ±")[0])
    labels = [label for label in shown if label != "untouched"]
    for label in labels:
        each = [
            1 + sum(sign * value(other, place) > sign * value(label, place) for other in labels)
            for place, sign in columns
        ]
        average = fmean([fmean(each[:2]), each[2], each[3], fmean(each[4:])])
        assert shown[label][0] == f"{average:.1f}"


def test_the_cost_table_is_the_records(study):
    cost = table(study.report, "\nCost\n")
    found = by_label(study)
    steps = {label: [r["cost"]["step_seconds"] for r in seeds.values()] for label, seeds in found.items()}
    for label, cells in cost.items():
        assert float(cells[0]) == pytest.approx(fmean(steps[label]), rel=6e-3)  # a median of two
        assert float(cells[1]) == pytest.approx(fmean(steps[label]) / fmean(steps["sft"]), abs=6e-3)
    assert cost["sft"][1] == "1.00"


def test_equal_time_has_its_own_cost_curves_and_steadiness(study):
    """With the seconds that its runs took, not those of the runs with equal steps."""
    cost = table(study.report, "\nCost, equal time\n")
    for label, seeds in by_label(study, "time").items():
        taken = sorted(r["cost"]["train_seconds"] for r in seeds.values())
        assert float(cost[label][3].replace(",", "")) == pytest.approx(fmean(taken), abs=0.051)  # a median of two
        assert cost[label][2] == str(study.results["settings"][label]["steps"]["time"])
    assert {f.name for f in view(study.record).blocks if hasattr(f, "png")} >= {
        f"{name}{mode}" for name in ("training", "noise", "wording") for mode in ("", "-time")
    }


def test_the_pictures_say_what_the_record_says(study):
    mode = study.results["modes"]["steps"]
    alts = {f.name: f.alt for f in view(study.record).blocks if hasattr(f, "png")}
    for label in ("sft", "lfu"):
        assert f"{label}: {-mode['against_untouched']['loss'][label]['value']:.3f}" in alts["gain-and-kept-steps"]
        assert f"{label}: {mode['noise'][label][0]:.4f}" in alts["noise"]
        # a seed's spread over the wordings is the deviation that the table has, not that of means over the seeds
        wording = [stdev(seed) for seed in zip(*mode["wording"]["templates"][label].values())]
        assert fmean(wording) == pytest.approx(mode["values"]["wording"][label]["mean"])
        first = [seed[0].get("lfu/sft_loss", seed[0]["loss"]) for seed in mode["curves"][label].values()]
        assert f"{label}: {fmean(first):.3f} to " in alts["training"]


def test_the_verdict_says_how_sure_and_what_sft_did(study):
    sentences = study.report.split("\n## ")[0].splitlines()[2:]
    assert sentences[0].startswith("Recommended: plain SFT at learning rate")
    assert any("paired differences, over 2 seeds" in s for s in sentences)
    assert any(s.startswith("Plain SFT against the untouched model") for s in sentences)


def test_every_training_says_on_how_many_threads_it_ran(study):
    told = {record["cost"]["machine"] for record in study.records.values() if record["method"]}
    assert told == {f"{machine()}, {torch.get_num_threads()} threads"}  # of several the report names all


def test_a_finished_run_is_never_repeated(study, monkeypatch, capsys):
    monkeypatch.chdir(study.folder)
    before = state(study.out)
    monkeypatch.setattr(study_run, "_perform", lambda *args: pytest.fail("something was done again"))
    assert run(study.model, "--methods sft,lfu:lam=0,lfu --seeds 2 --learning_rates 1e-2,3e-2 --equal both") == 0
    assert state(study.out) == before
    assert results(study.out) == study.results
    assert "to go" not in capsys.readouterr().err


def test_a_study_that_workers_finished_elsewhere_is_reported(study, monkeypatch):
    """On a login node without the GPU that trained, or where other packages are installed."""
    monkeypatch.chdir(study.folder)
    flags = "--methods sft,lfu:lam=0,lfu --seeds 2 --learning_rates 1e-2,3e-2 --equal both"
    before = state(study.out)
    here = keys.here()
    monkeypatch.setattr(keys, "here", lambda: {"device": "cuda", "versions": {"torch": "0.1"}})
    monkeypatch.setattr(study_run, "_perform", lambda *args: pytest.fail("something was done again"))
    monkeypatch.setattr("subprocess.Popen", lambda *args, **more: pytest.fail("a process was started"))
    assert run(study.model, flags, "--jobs 2") == 0
    assert results(study.out) == study.results
    assert keys.noted(study.out) == here
    assert state(study.out) == before


def test_the_runs_of_a_worker_on_another_kind_of_machine_are_found(here, model, monkeypatch):
    """The command that starts the workers sees another device and other defaults than they do."""
    real = keys.here
    theirs = real()

    class Worker:
        """A process in name only, with the machine's real environment."""

        def __init__(self, command, **options):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(keys, "here", real)
                self.code = main(command[3:])  # after python -m lfu.cli

        def wait(self):
            return self.code

        poll = wait

    monkeypatch.setattr(keys, "here", lambda: {"device": "cuda", "versions": {"torch": "0.1"}})
    monkeypatch.setattr(processes.subprocess, "Popen", Worker)
    assert run(model, "--methods sft --measures none --max_steps 1", "--jobs 2") == 0
    assert {r["state"] for r in results()["runs"]} == {"finished"}
    assert json.loads(Path("out/record.json").read_text())["settings"]["trained with"] == theirs
    # who trains by himself does so on the machine that he has
    monkeypatch.setattr(study_run, "_perform", lambda *args: pytest.fail("trained anew"))
    with pytest.raises(pytest.fail.Exception, match="trained anew"):
        run(model, "--methods sft,gem --measures none --max_steps 1")


def test_what_the_machine_decides_is_in_the_key_if_it_was_given(tmp_path):
    def key(given, **values) -> tuple[str, str]:
        config = LfUConfig(str(tmp_path), bf16=values["bf16"], use_cpu=True)
        model = ModelArguments("m", dtype=values["dtype"])
        return keys.run_key(config, model, {}, given), keys.start_key(model, {}, given)

    one, other = {"bf16": True, "dtype": "bfloat16"}, {"bf16": False, "dtype": "float32"}
    assert key(set(), **one) == key(set(), **other)
    assert not set(key({"bf16", "dtype"}, **one)) & set(key({"bf16", "dtype"}, **other))
    words = ["--dtype", "float32", "--bf16=false", "--no_use_peft", "--data", "bf16"]
    assert set(flags_of(words, "compare")[0]) == {"dtype", "bf16", "use_peft", "data"}


def test_a_finished_study_leaves_no_weights_and_no_halves(study):
    for folder in (study.out / "runs").iterdir():
        files = {path.name for path in folder.iterdir()}
        losers = {"part-validation.json", "trained.json"}
        assert files <= KEPT_FILES | losers, folder.name
        if (folder / "record.json").is_file():
            assert not files & losers


def test_a_training_is_the_command_that_the_report_gives(study, monkeypatch, capsys):
    """`lfu train` with these very words gives the weights that were measured."""
    monkeypatch.chdir(study.folder)
    commands = [words for one in study.results["settings"].values() for words in one["commands"].values()]
    folders = [word for words in commands for word in words if word.startswith("--output_dir=")]
    assert len(set(folders)) == len(folders) == len(commands)  # one after another they replace nothing
    words = study.results["settings"]["lfu"]["commands"]["seed 1, 3 steps"]
    assert shlex.join(["lfu", "train", *words]) in study.report
    assert main(["train", *words, "--output_dir", "alone", "--report_to", "none", "--disable_tqdm", "true"]) == 0
    assert weights_hash(load_model("alone")[0]) == by_label(study)["lfu"][1]["model"]["weights"]


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_failing_run_is_reported_and_the_others_go_on(here, model, capsys):
    assert run(model, "--methods sft,osf:keep=99,gem --measures gain") == 0
    captured = capsys.readouterr()
    assert "osf keep=99, seed 0, learning rate 0.01, 3 steps: failed in training" in captured.err
    assert "1 of 4 runs failed (osf keep=99): see Runs." in captured.out
    states = {run_["label"]: run_["state"] for run_ in results()["runs"]}
    assert states == {"untouched": "finished", "sft": "finished", "osf keep=99": "failed", "gem": "finished"}
    report = Path("out/report.md").read_text()
    assert "osf.keep=99 leaves nothing to train" in report
    assert "Traceback" in next(Path("out/runs").glob("osf*/failed.json")).read_text()
    # started again, it is tried again, and nothing else
    assert run(model, "--methods sft,osf:keep=99,gem --measures gain") == 0
    assert capsys.readouterr().err.count("failed in training") == 1


def test_two_labels_of_one_training_share_it(here, model):
    """Also where it was done under the other label alone."""
    assert run(model, "--methods sft,lfu --measures gain --match_rows 0") == 0
    assert run(model, "--methods sft,lfu:alpha=auto,lfu --measures gain --match_rows 0") == 0
    places = {r["label"]: (r["state"], r["folder"]) for r in results()["runs"]}
    assert places["lfu"] == places["lfu alpha=auto"]
    assert places["lfu"][0] == "finished"
    assert len(records()) == 3


def test_every_run_fails(here, model, capsys):
    assert run(model, "--methods sft --measures none --lora_target_modules nonsense") == 2
    assert "every run failed; the first, sft: " in capsys.readouterr().err


def test_a_training_that_diverges_is_a_failing_run(here, model, monkeypatch):
    assert run(model, "--methods sft,lfu:learning_rate=1e30 --measures gain --match_rows 0 --max_grad_norm 0") == 0
    failed = {r["label"]: r["error"] for r in results()["runs"] if r["state"] == "failed"}
    assert set(failed) == {"lfu learning_rate=1e30", "sft learning_rate=1e30"}
    assert all("no finite number" in error for error in failed.values())
    monkeypatch.setattr(study_run, "train", lambda *args, **more: pytest.fail("it would diverge again"))
    assert run(model, "--methods sft,lfu:learning_rate=1e30 --measures gain --match_rows 0 --max_grad_norm 0") == 0
    assert {r["label"] for r in results()["runs"] if r["state"] == "failed"} == set(failed)


def test_two_sessions_on_one_folder_try_a_failing_run_once(tmp_path):
    """What fails in one while the other is at work has failed for both; what failed before is tried again."""
    path = tmp_path / "runs" / "osf"
    first, second = Place(path, "key", "first", time.time()), Place(path, "key", "second", time.time())
    second.fail(ValueError("no"), "training", "")
    assert first.failed
    assert second.failed
    later = Place(path, "key", "third", time.time())
    assert not later.failed
    later.begin({})  # and the others see what comes of it
    assert not first.failed
    later.fail(ValueError("no"), "training", "")
    assert first.failed


class Killed(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


def test_a_process_that_died_has_failed_its_run(here, model, capsys, monkeypatch):
    """Its mark is there and its lock is free: within one session that is a death, not a run to do again."""
    held = Place.mark

    def mark_twice(place: Place) -> None:
        held(place)
        if "gem" in place.path.name:
            raise Killed

    monkeypatch.setattr(Place, "mark", mark_twice)
    monkeypatch.setattr(Place, "unmark", lambda place: None)
    with pytest.raises(Killed):
        run(model, "--methods sft,gem --measures none --worker me")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert run(model, "--methods sft,gem --measures none --worker me") == 0
    assert "gem, seed 0, learning rate 0.01, 3 steps: failed: its process died" in capsys.readouterr().err
    assert run(model, "--methods sft,gem --measures none") == 0  # another start tries again
    assert {r["state"] for r in results()["runs"]} == {"finished"}


def test_ctrl_c_says_how_to_go_on_and_finished_phases_are_kept(here, model, capsys, monkeypatch):
    def stop(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study_run, "_about", stop)
        assert run(model, "--methods sft --measures gain --match_rows 0") == 130
    assert "0 of 2 runs are finished and kept: the same command continues from there." in capsys.readouterr().err
    with monkeypatch.context() as patch:  # untouched: measured but for the last part; then sft
        patch.setattr(study_run, "parts_of", lambda *args, **more: dict.fromkeys(("validation", "gain"), Part(1, stop)))
        assert run(model, "--methods sft --measures gain --match_rows 0") == 130
    with monkeypatch.context() as patch:
        patch.setattr(study_run, "train", lambda *args, **more: pytest.fail("it was trained already"))
        assert run(model, "--methods sft --measures gain --match_rows 0") == 0
    assert {r["state"] for r in results()["runs"]} == {"finished"}


# --- what a run depends on ------------------------------------------------------------------------------------------


def test_a_run_is_done_again_when_what_decides_it_changes(here, model, monkeypatch):
    run(model, "--methods sft --measures none")
    first = set(records())
    run(model, "--methods sft --measures none --weight_decay 0.1")
    second = set(records())
    assert len(second - first) == 1  # the untouched model knows no weight decay
    write_questions(Path("rows.jsonl"), 45)
    run(model, "--methods sft --measures none")
    assert len(set(records()) - second) == 2


@pytest.mark.parametrize(("method", "knob", "matters"), [("sdft", "cache", False), ("replay", "data", True)])
def test_files_that_a_knob_names_matter_if_they_are_read(tmp_path, method, knob, matters):
    def key() -> str:
        config = LfUConfig(str(tmp_path), method=method, method_args={knob: str(tmp_path)})
        return keys.run_key(config, ModelArguments("m"), {})

    (tmp_path / "a.jsonl").write_text("{}")
    before = key()
    (tmp_path / "b.jsonl").write_text("{}")
    assert (key() != before) == matters


def test_all_weights_and_a_base_model_without_chat_template(here, tmp_path_factory):
    from tiny_folder import save_model

    base = save_model(tmp_path_factory.mktemp("base"), chat=False)
    assert run(base, "--methods sft,lfu_reps --use_peft false") == 0
    found = results()
    assert set(found["metrics"]) == {"loss", "match", "kept:knowledge", "kept:prose", "reworded", "wording", "noise"}
    assert 0 < found["modes"]["steps"]["cost"]["sft"]["distance"] < 1


def test_a_row_that_is_longer_than_the_model_reads_is_left_out_of_the_noise_alone(here, tmp_path_factory):
    from tiny_folder import save_model

    base = save_model(tmp_path_factory.mktemp("short"), max_position_embeddings=128)
    write_questions(Path("test.jsonl"), 6)
    long = {"question": "What is 1 + 1, please? " * 5, "answer": "1 + 1 = 2\n#### 2"}
    Path("test.jsonl").write_text(f"{json.dumps(long)}\n{Path('test.jsonl').read_text()}")
    assert run(base, "--methods sft --measures gain,noise --eval_data test.jsonl --robust_rows 6 --match_rows 0") == 0
    assert {key: metric["items"] for key, metric in results()["metrics"].items()} == {"loss": 7, "noise": 5}


@pytest.mark.parametrize("shape", ["messages", "text", "body", "choices"])
def test_rows_of_other_shapes(here, model, shape):
    named = ["--dataset_text_field body"] if shape == "body" else []
    rows = {
        "messages": lambda i: {
            "messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]
        },
        "text": lambda i: {"text": f"This is text number {i}, and a short one."},
        "body": lambda i: {"body": f"This is text number {i}, and a short one.", "text": "Another."},
        "choices": lambda i: {"question": f"Is it {i}?", "choices": ["yes", "no", "maybe"], "answer": i % 3},
    }[shape]
    Path("rows.jsonl").write_text("".join(json.dumps(rows(i)) + "\n" for i in range(30)))
    assert run(model, "--methods sft --measures gain,prompts,noise", *named) == 0
    found = results()
    assert set(found["metrics"]) == (
        {"loss"} if shape in ("text", "body") else {"loss", "reworded", "wording", "noise"}
    )
    assert set(found["left_out"]) == ({"prompts", "noise"} if shape in ("text", "body") else set())
    if named:
        assert set(json.loads(Path("out/data/train.jsonl").read_text().splitlines()[0])) == {"text"}
        assert run(model, "--methods sft --dataset_text_field boddy", out="other") == 2


def test_retention_files_are_measured_and_named(here, model):
    Path("mine.jsonl").write_text("".join(json.dumps({"text": f"A passage, number {i}."}) + "\n" for i in range(9)))
    assert run(model, "--methods sft --measures forgetting --retention house=mine.jsonl rows.jsonl") == 0
    found = results()["metrics"]
    assert found["kept:house"]["kind"] == "text"
    assert found["kept:rows"]["kind"] == "nll"
    assert found["kept:house"]["items"] == 6
    trained = Path("out/data/train.jsonl").read_text().splitlines()
    seen = sum(line in trained for line in Path("rows.jsonl").read_text().splitlines()[:12])  # --retention_limit
    assert f"{seen} of 12 items of rows, to be kept, are training rows, word for word." in results()["same"]["rows"]


def stub(left: int, **more) -> SimpleNamespace:
    """A study with so many tasks left, whatever is done."""
    return SimpleNamespace(**{
        "session": "me", "todo": lambda: [1] * left, "follow": lambda: None, "useful": lambda jobs: min(jobs, left),
        "peak_memory": lambda: 1, "say": lambda line: None,
    } | more)  # fmt: skip


@pytest.mark.parametrize(
    ("gpus", "free", "processes_", "says"),
    [
        ([], 10 * 2**30, 3, "3 of 4 processes at once: a training takes 2.0 GiB"),
        ([], 2**30, 1, "1 of 4 processes"),
        ([], 100 * 2**30, 4, ""),
        (["0", "1"], 2**30, 2, "2 processes at once: one per GPU"),
    ],
)
def test_no_more_processes_than_memory_holds(gpus, free, processes_, says, monkeypatch, tmp_path):
    """By what the first training took; the others begin when it is over."""
    monkeypatch.setattr(processes, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(processes, "free_memory", lambda: free)
    monkeypatch.setattr(processes, "POLL", 0.0)
    looks, said, started = iter([None, None]), [], []

    class Process:
        """One that is at work until it is waited for."""

        def __init__(self, command, **options):
            started.append(command)

        poll = lambda self: None
        wait = lambda self: 0

    monkeypatch.setattr(processes.subprocess, "Popen", Process)
    study = stub(9, peak_memory=lambda: next(looks, 2 * 2**30), say=said.append)
    work_in_processes(study, 4, ["-c", "pass"])
    assert len(started) == processes_
    assert [line for line in said if says not in line] == []
    assert bool(said) == bool(says)


def test_workers_are_useful_as_long_as_tasks_may_follow():
    """A bisection knows one task at a time, and the points that it comes to have many."""
    for whole, count in ((True, 1), (False, 4)):
        plan = SimpleNamespace(whole=whole)
        assert Study.useful(SimpleNamespace(plan=lambda plan=plan: plan, todo=lambda: [1]), 4) == count


@pytest.mark.parametrize(("code", "rounds"), [(0, 1), (9, 2)])
def test_processes_that_die_are_not_started_for_ever(code, rounds, tmp_path):
    study = stub(2)
    script = f"open({str(tmp_path / 'count')!r}, 'a').write('x'); import os; os._exit({code})"
    work_in_processes(study, 2, ["-c", script])
    assert (tmp_path / "count").read_text() == "x" * 2 * rounds


@pytest.mark.parametrize(
    ("listed", "count", "shares"),
    [
        (None, 0, [None, None]),
        (None, 2, ["0", "1", "0"]),
        ("4,5", 2, ["4", "5", "4"]),
        ("GPU-a", 1, ["GPU-a", "GPU-a"]),
        ("", 0, [None]),
    ],
)
def test_a_process_has_one_gpu_of_those_that_there_are(listed, count, shares, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed or "")
    if listed is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    found = [processes._share(number, len(shares)).get("CUDA_VISIBLE_DEVICES") for number in range(len(shares))]
    assert found == shares
    assert processes.keep_one_gpu() == count  # a process that trains by itself has one, too
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == (shares[0] if count > 1 else listed)


@pytest.mark.parametrize(("busy", "threads"), [(0.0, 4), (20.0, 3), (25.0, 3), (100.0, 1)])
def test_no_more_threads_than_idle_cores(busy, threads, monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr(processes.psutil, "cpu_percent", lambda seconds: busy)
    monkeypatch.setattr(processes.psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    processes.leave_busy_cores()
    assert chosen == []  # who says how many has them
    monkeypatch.delenv("OMP_NUM_THREADS")
    processes.leave_busy_cores()
    assert chosen == [threads]


class Job:
    """One of submitit's, done at once."""

    job_id = "1"

    def __init__(self, call, command):
        self.code = call(command)

    exception = lambda self: None
    result = lambda self: self.code


@pytest.mark.parametrize(("left", "code", "jobs"), [(0, 0, 0), (2, 0, 2), (2, 9, 4)], ids=["done", "well", "dying"])
def test_jobs_of_a_cluster_that_die_leave_a_report_to_write(left, code, jobs, tmp_path, monkeypatch):
    """A run whose job died is taken up once more, and called failed; of a finished study nothing is submitted."""
    executor = SimpleNamespace(update_parameters=lambda **given: None, batch=nullcontext, submit=Job)
    fake = SimpleNamespace(AutoExecutor=lambda folder, cluster: executor)
    monkeypatch.setitem(sys.modules, "submitit", fake)
    said = []
    study = stub(left, folder=tmp_path, say=said.append)
    script = f"open({str(tmp_path / 'count')!r}, 'a').write('x'); raise SystemExit({code})"
    work_on_cluster(study, 5, ["-c", script], {})
    assert (tmp_path / "count").exists() == bool(jobs)
    assert not jobs or (tmp_path / "count").read_text() == "x" * jobs
    assert any("ended early" in line for line in said) == bool(left)


def test_a_mistake_in_a_process_is_the_users():
    study = stub(1)
    with pytest.raises(UserError, match="the error above"):
        work_in_processes(study, 3, ["-c", "raise SystemExit(2)"])
    with pytest.raises(KeyboardInterrupt):
        work_in_processes(study, 3, ["-c", "raise SystemExit(130)"])
