"""The test bed: every method on models small enough to train from scratch, many runs at once.

    python benchmarks/bed.py run                                      # a small version: make study
    python benchmarks/bed.py run --plan study --bases 24 --draws 3    # the one in docs/results.md, on a GPU
    python benchmarks/bed.py run --plan updates lora field            # parts of it that came later; see testbed/plan.py
    python benchmarks/bed.py report runs/testbed                      # tables and picture of what is there
    python benchmarks/bed.py directions --bases 12 --draws 1          # where the methods' gradients point

Base models of a million weights learn seven skills from scratch; an eighth, a composition of two of them, is then
fine-tuned on few rows. Each setting is run on every base model with several draws of rows, all at once. What is
finished is kept: the same command goes on where it stopped. Needs PyTorch and NumPy; the report also Matplotlib, SciPy.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from testbed import graphs
from testbed.bases import bases, runs_of
from testbed.llama import Shape
from testbed.material import Bed
from testbed.plan import PLANS
from testbed.setting import Setting
from testbed.skills import vocabulary
from testbed.theta import norm

RUNS = "runs.jsonl"
FEW = 3.0  # points: the same model answers a few questions otherwise on another machine


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a plan or writes the report. Returns 0, 2 for what the user can put right, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="fine-tune and score every setting of a plan")
    runs.add_argument("--out", type=Path, default=Path("runs/testbed"), help="folder for bases and runs")
    runs.add_argument(
        "--plan", choices=PLANS, nargs="+", default=["small"], help="which settings, one plan after another"
    )
    runs.add_argument("--bases", type=int, default=4, help="base models")
    runs.add_argument("--draws", type=int, default=2, help="draws of rows a base")
    runs.add_argument("--base_steps", type=int, default=3000, help="steps in which a base learns all skills")
    runs.add_argument("--width", type=int, default=128, help="hidden size of the models, a multiple of 32")
    runs.add_argument("--minutes", type=float, help="start no setting that would end after so many")
    runs.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    runs.add_argument("--eager", action="store_true", help="no CUDA graphs")
    runs.set_defaults(command=run)
    turns = commands.add_parser("directions", help="where the methods' gradients point, on the bases of a folder")
    turns.add_argument(
        "--out", type=Path, default=Path("runs/testbed"), help="the folder of `run`, with the same flags"
    )
    for name, default in (("bases", 4), ("draws", 2), ("base_steps", 3000), ("width", 128)):
        turns.add_argument(f"--{name}", type=int, default=default)
    turns.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    turns.set_defaults(command=point, eager=True)
    reports = commands.add_parser("report", help="tables and picture of a folder")
    reports.add_argument("folder", type=Path)
    reports.add_argument("--sft", type=Path, help="a folder whose plain SFT counts, too, on what both have")
    reports.set_defaults(command=report)
    options = parser.parse_args(argv)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print("\ninterrupted: what is finished is kept, the same command goes on", file=sys.stderr)
        return 130


def report(options: argparse.Namespace) -> int:
    """Tables and picture of what has been run."""
    if not (options.folder / RUNS).is_file():
        print(f"error: {options.folder} holds no {RUNS}: first `python benchmarks/bed.py run`", file=sys.stderr)
        return 2
    from testbed.report import Study, write

    study = Study.read(options.folder / RUNS, entries(options.folder / RUNS))
    if options.sft:
        study.take_sft(Study.read(options.sft / RUNS, entries(options.sft / RUNS)))
    write(options.folder, study)
    return 0


def point(options: argparse.Namespace) -> int:
    """Cosines and shares before, amid and after plain SFT on 16 and 64 rows: `directions.jsonl`."""
    from testbed.directions import directions

    bed = _bed(options, print)
    path = options.out / "directions.jsonl"
    for rows, steps in ((16, 1), (16, 20), (16, 60), (64, 120)):
        setting = Setting(rows, steps, 1e-3 if steps > 1 else 1e-9)
        found = directions(bed, setting)
        _append(path, {"setting": setting.changed(), "directions": found})
        print(json.dumps({name: round(sum(v) / len(v), 4) for name, v in found.items()}), flush=True)
    return 0


def _bed(options: argparse.Namespace, say: Callable[[str], None]) -> Bed:
    graphs.use_graphs = not options.eager
    torch.backends.cuda.matmul.allow_tf32 = False
    shape = Shape(len(vocabulary()), options.width, 3 * options.width)
    return Bed(bases(options.out, options.bases, options.base_steps, shape, options.device, say), options.draws)


def run(options: argparse.Namespace) -> int:
    """Every setting of the plan that isn't there yet, in order, a line of JSON each."""
    began = time.monotonic()
    say = lambda line: print(f"{time.monotonic() - began:6.1f} s  {line}", flush=True)
    bed = _bed(options, say)
    if bed.device.type == "cuda" and graphs.use_graphs:
        graphs.use_graphs = graphs_agree(bed)
        say(f"CUDA graphs: {'in use' if graphs.use_graphs else 'no'}")
    path = options.out / RUNS
    done = {Setting.from_json(entry["setting"]).key for entry in entries(path)}
    listed = dict.fromkeys(s for plan in options.plan for s in PLANS[plan]())
    todo = [s for s in listed if s.key not in done]
    machine = torch.cuda.get_device_name() if bed.device.type == "cuda" else "CPU"
    say(f"{len(bed.seeds)} runs at once on {machine}: {len(todo)} settings to do, {len(done)} done")
    untouched = bed.untouched()
    if not path.is_file():
        _append(path, {"bases": untouched, "draws": options.draws, "machine": machine})
    elif not same_bases(path, untouched):
        print(f"error: {path} holds runs of other base models: give --out another folder", file=sys.stderr)
        return 2
    took = 0.0
    while todo:
        if options.minutes and time.monotonic() - began + 1.5 * took > 60 * options.minutes:
            say(f"time is up: {len(todo)} settings are left")
            break
        group = [s for s in todo if s.trained == todo[0].trained]
        start = time.monotonic()
        tuned = bed.run(todo[0].trained)
        for setting in group:
            result = bed.measured(setting, tuned)
            _append(path, {"setting": setting.changed(), "runs": result})
            means = " ".join(f"{sum(result[a]) / len(result[a]):5.1f}" for a in ("target", "reworded", "others"))
            say(f"{means}  {setting.rows:3} rows  {setting.method}, {setting.place}")
        todo = [s for s in todo if s not in group]
        took = time.monotonic() - start
    return 0


def same_bases(path: Path, untouched: dict[str, list[float]]) -> bool:
    """Whether the runs in a file began at these base models; bases trained anew may come out as others."""
    kept = json.loads(path.read_text(encoding="utf-8").splitlines()[0])["bases"]
    pairs = [pair for name, values in untouched.items() for pair in zip(kept[name], values, strict=True)]
    return all(abs(old - new) <= FEW for old, new in pairs)


def graphs_agree(bed: Bed) -> bool:
    """Whether training by a CUDA graph ends where plain updates end, to a hundredth of the way, with either theta."""
    start, kept, agree = runs_of(bed.base, bed.which), graphs.use_graphs, True
    for setting in (Setting(16, 10, 1e-3, auxiliary="own", strength=0.5, share=0.5), Setting(16, 10, 2e-3, lora=True)):
        captured = bed.run(setting)
        graphs.use_graphs = False
        plain = bed.run(setting)
        graphs.use_graphs = kept
        apart = norm([captured[name] - plain[name] for name in plain])
        way = norm([plain[name] - start[name] for name in plain])
        agree = agree and bool((apart < 0.01 * way).all())
    return agree and kept


def entries(path: Path) -> list[dict]:
    """The finished settings in a file; a line that a killed run left half-written is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "setting" in entry:
            found.append(entry)
    return found


def _append(path: Path, entry: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    sys.exit(main())
