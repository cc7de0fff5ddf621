"""A study that is killed and started again ends with the very files of one that was left alone, but for times."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
from tiny_study import FAST, records, results, run, write_questions

from lfu.report.compare_view import view
from lfu.report.markdown import markdown
from lfu.study import processes
from lfu.study.live import Board
from lfu.study.train import PeakMemory, Watch, step_time, unsteadiness

# what depends on the machine and the hour, and nothing else
TIMES = {"created", "cost", "key", "machine"}


def timeless(value):
    if isinstance(value, dict):
        return {name: timeless(each) for name, each in value.items() if name not in TIMES}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def everything(out: Path) -> dict:
    """The study's record and report, and what every run has kept."""
    record = json.loads((out / "record.json").read_text())
    for mode in record["results"]["modes"].values():
        for cost in mode["cost"].values():
            for name in cost:
                if "seconds" in name or name in ("ratio", "peak_memory", "unsteady"):
                    cost[name] = 1.0
    logs = {
        path.parent.name: [
            timeless({k: v for k, v in json.loads(line).items() if k != "seconds"})
            for line in path.read_text().splitlines()
        ]
        for path in out.glob("runs/*/log.jsonl")
    }
    return {
        "record": timeless(record | {"results": {**record["results"], "modes": record["results"]["modes"]}}),
        "report": markdown(view(record)),
        "pictures": {f.name: (f.alt, f.caption) for f in view(record).blocks if hasattr(f, "png")},
        "runs": timeless(records(out)),
        "logs": logs,
    }


FLAGS = "--methods sft,lfu:lam=auto --max_steps 20 --save_steps 3 --measures gain,forgetting --match_rows 0"


def kill_in_training(out: Path, killed: list[Path]) -> None:
    """Kills the process that trains by LfU, as soon as it has a checkpoint."""
    while not (found := list(out.glob("runs/lfu*/trainer/checkpoint-*/trainer_state.json"))):
        time.sleep(0.002)
    folder = found[0].parents[2]
    os.kill(json.loads((folder / "begun.json").read_text())["process"], signal.SIGKILL)
    killed.append(folder)


def test_a_process_killed_in_the_middle_of_a_training(model, tmp_path, monkeypatch, capsys, quick_pictures):
    """Of two processes one dies: its run is called failed, the other goes on. Started again, the end is the same as
    that of one process that was left alone."""
    for name in ("killed", "alone"):
        (tmp_path / name).mkdir()
        write_questions(tmp_path / name / "rows.jsonl")
    monkeypatch.setattr(processes.subprocess, "Popen", forked.Popen)
    monkeypatch.chdir(tmp_path / "killed")
    killed: list[Path] = []
    killer = threading.Thread(target=kill_in_training, args=(Path("out").absolute(), killed), daemon=True)
    killer.start()
    assert run(model, FLAGS, "--jobs 2") == 0
    (folder,) = killed
    assert not (folder / "trained.json").exists(), "it was killed too late to tell anything"
    assert {r["label"]: r["state"] for r in results()["runs"]}["sft"] == "finished"
    assert {r["error"] for r in results()["runs"] if r["state"] == "failed"} == {
        "the process that worked on it died, perhaps of too little memory"
    }
    assert "1 of 3 runs failed (lfu lam=auto)" in capsys.readouterr().out
    assert run(model, FLAGS) == 0
    monkeypatch.chdir(tmp_path / "alone")
    assert run(model, FLAGS) == 0
    killed_, alone = everything(tmp_path / "killed" / "out"), everything(tmp_path / "alone" / "out")
    for name, what in alone.items():
        assert killed_[name] == what, name


def stopped_after_five_steps(model: str, flags: str, monkeypatch) -> int:
    """A study in `stopped` in which every training is stopped once, if it has five steps; returns how many were."""
    stopped, on_log = [], Watch.on_log

    def stop_at_5(watch, args, state, control, **more):
        on_log(watch, args, state, control, **more)
        if state.global_step == 5 and watch.path not in stopped:
            stopped.append(watch.path)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_log", stop_at_5)
        while (code := run(model, flags, out="stopped")) == 130:
            pass
    assert code == 0
    return len(stopped)


def test_a_search_and_equal_time_that_are_stopped_and_go_on(here, model, monkeypatch, quick_pictures):
    """From their start, without checkpoints: the same rates, weights and curves as without a stop. And what was decided
    by the clock stays: no folder is left of a run with other steps."""
    flags = "--methods sft,lfu:lam=auto --measures none --max_steps 7 --learning_rates 1e-2,3e-2 --equal both"
    assert stopped_after_five_steps(model, flags, monkeypatch) >= 4
    assert run(model, flags, out="alone") == 0
    by_steps = []
    for out in ("stopped", "alone"):
        found = results(out)
        assert {f.name for f in Path(out, "runs").iterdir() if f.is_dir()} == {
            Path(r["folder"]).name for r in found["runs"]
        }
        assert {r["state"] for r in found["runs"]} == {"finished"}
        curves = {name: record.get("curve") for name, record in records(out).items()}
        by_steps.append([
            (r["label"], r["learning_rate"], r["weights"], curves.get(Path(r["folder"]).name))
            for r in found["runs"] if r["steps"] == 7
        ])  # fmt: skip
    assert by_steps[0] == by_steps[1]


def test_trainings_that_are_stopped_go_on_from_their_checkpoints(here, model, monkeypatch, quick_pictures):
    """Every kind of method that carries something along."""
    flags = "--methods sft,lfu:lam=auto,ema --measures none --max_steps 7 --save_steps 3"
    assert stopped_after_five_steps(model, flags, monkeypatch) == 3
    assert run(model, flags, out="alone") == 0
    assert [r["weights"] for r in results("stopped")["runs"]] == [r["weights"] for r in results("alone")["runs"]]
    curves = [[r["curve"] for r in records(out).values() if "curve" in r] for out in ("stopped", "alone")]
    assert curves[0] == curves[1]


def test_a_log_that_was_cut_off(tmp_path):
    """Of a killed run the steps of the checkpoint are left: not the steps after it, nor half a line."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.0, "seconds": 1}\n{"step": 2, "loss": 1.0, "seconds": 1}\n{"step": 3, "lo')
    history = [{"step": 1, "loss": 2.0, "epoch": 0.1, "seconds": 1}]
    watch, state = Watch(path, Board()), SimpleNamespace(log_history=history)
    watch.on_train_begin(None, state, None)
    assert path.read_text() == '{"step": 1, "loss": 2.0, "seconds": 1}\n'
    history.append({"loss": float("nan"), "lfu/sft_loss": 1.5, "epoch": 0.2, "step": 2})
    watch.on_log(None, state, None, logs=history[-1])
    assert json.loads(path.read_text().splitlines()[1]) == {"loss": None, "lfu/sft_loss": 1.5, "step": 2, "seconds": 0}


def test_the_time_of_a_step():
    assert step_time([9.0, 1.0, 2.0, 3.0]) == 2.0  # the first one warms up
    assert step_time([9.0]) == 9.0
    # every=4: one step of four is twice as long, whichever is the first; a disturbance counts for nothing
    for start in range(4):
        seconds = [2.0 if (start + i) % 4 == 0 else 1.0 for i in range(32)]
        assert step_time([9.0, *seconds], 4) == 1.25
        assert step_time([9.0, *seconds[:20], 50.0, *seconds[21:]], 4) == 1.25
        assert unsteadiness([9.0, *seconds], 4) == 0.0
    assert step_time([9.0, 1.0, 2.0], 4) == 1.5  # no whole cycle
    assert unsteadiness([9.0, 1.0, 1.0, 1.0, 1.0]) == 0.0
    assert unsteadiness([9.0, 1.0, 1.0, 3.0, 3.0]) == pytest.approx(1.0)


def test_peak_memory_is_that_of_the_run():
    import torch

    def peak_of(megabytes: int) -> int:
        memory = PeakMemory()
        torch.ones(megabytes * 2**18).sum()
        return memory.peak() or 0

    low = peak_of(1)
    if not low:
        pytest.skip("this system doesn't tell")
    assert 250 * 2**20 < peak_of(300) - low < 350 * 2**20
    assert abs(peak_of(1) - low) < 50 * 2**20  # the peak before doesn't count


@pytest.mark.timeout(600)
def test_jobs_of_a_cluster_share_the_study_and_a_wrong_word_for_it_is_one_line(
    here, model, monkeypatch, tmp_path_factory
):
    """In one process of their own: submitit's import sets up logging anew and closes handlers, pytest's too."""
    command = ["compare", "--model", model, "--data", "rows.jsonl", "--output_dir", "out", *FAST.split()]
    wrong = [
        [*command, "--methods", "sft", "--submitit", options] for options in ("cluster=moon", "cluster=local,gpus=1")
    ]
    flags = "--methods sft,gem --measures none --max_steps 1 --jobs 2 --submitit cluster=local,timeout_min=5"
    every = [*wrong, [*command, *flags.split()]]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with forked.python(tmp_path_factory.mktemp("python")) as python:
        Path("program.py").write_text(
            "from lfu.cli import main; from lfu.study import cluster; usual = cluster.worker\n"
            f"cluster.worker = lambda *of: [{str(python)!r}, *usual(*of)[1:]]\n"
            f"print([main(words) for words in {every!r}])"
        )
        done = forked.run(["python", "program.py"], here)
    assert done.stdout.splitlines()[-1] == "[2, 2, 0]", done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: --submitit" in line]
    assert "moon" in errors[0]
    assert "gpus" in errors[1]
    assert "Traceback" not in done.stderr
    assert {r["state"] for r in results()["runs"]} == {"finished"}
    assert "their logs are in out/jobs" in done.stderr
    assert "numbers  out/record.json" in done.stdout
    assert list(Path("out/jobs").glob("*_log.out"))
