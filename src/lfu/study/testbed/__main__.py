"""`python -m lfu.study.testbed`: methods on the controlled test bed, over several seeds, with a report.

A Llama of a million parameters learns seven skills from scratch; an eighth, a composition of two of them, is then
fine-tuned on few rows: by the best known methods at a few strengths each (about 25 minutes on 2 CPU cores), with --all
by every setting there is. The base model and every finished run are kept in the output folder: a killed study goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lfu.study.keys import digest, of_files
from lfu.support.errors import UserError
from lfu.support.files import dump_json, new_folder, write_text
from lfu.support.quiet import quiet_libraries


def main(argv: list[str] | None = None) -> int:
    """Runs the study. Returns 0, 2 for what the user can put right, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m lfu.study.testbed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/testbed"), help="folder for runs and report")
    parser.add_argument("--seeds", type=int, default=5, help="seeds: training rows, their order, all that is random")
    parser.add_argument("--rows", type=int, default=64, help="rows that are fine-tuned on")
    parser.add_argument("--steps", type=int, default=3000, help="steps in which the base model learns all skills")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--all", action="store_true", help="every setting: LfU's own knobs and all methods, hours of work"
    )
    which.add_argument("--families", nargs="+", help="only these curves (and SFT): lfu, kl, ...")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each in a process of one thread")
    options = parser.parse_args(argv)
    command = " ".join(["python -m lfu.study.testbed", *(sys.argv[1:] if argv is None else argv)])
    try:
        with quiet_libraries():
            run(options, command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {options.out}: {error}: free some space or choose another --out", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: finished runs are kept, the same command goes on", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """The whole study; returns the record.

    Raises:
        UserError: an unknown family.
    """
    from lfu.evaluation.record import describe_model, make_record
    from lfu.report.page import write_report
    from lfu.study.testbed.run import measure

    chosen = _chosen(options)
    folder = _base_folder(options)
    plan = [(setting, seed) for seed in range(options.seeds) for setting in chosen]
    runs = []
    for number, ((setting, seed), result) in enumerate(zip(plan, _results(options, folder, plan)), start=1):
        runs.append({"name": setting.name, "family": setting.family, "seed": seed, **result})
        scored = result["scores"]
        print(
            f"[{number}/{len(plan)}] {setting.name}, seed {seed}: target {scored['target']['accuracy']:.1%}, "
            f"others {scored['others']['accuracy']:.1%}",
            flush=True,
        )
    base = _load(folder)
    record = make_record(
        "testbed",
        models={"base": describe_model("made here from scratch", base)},
        settings={
            "rows": options.rows,
            "steps": options.steps,
            "seeds": options.seeds,
            "list": [asdict(setting) for setting in chosen],
        },
        results={"base": measure(base), "runs": runs},
        command=command,
        seed=0,
    )  # fmt: skip
    write_report(record, options.out)
    print(f"page     {options.out / 'index.html'}\nnumbers  {options.out / 'record.json'}")
    return record


def _chosen(options: argparse.Namespace) -> list[Any]:
    """The settings that were asked for.

    Raises:
        UserError: an unknown family.
    """
    from lfu.study.testbed.settings import SHORT, settings

    every = settings()
    if unknown := set(options.families or []) - {s.family for s in every}:
        raise UserError(f"unknown family {sorted(unknown)[0]!r}: use {', '.join({s.family: 0 for s in every})}")
    families = ("sft", *options.families) if options.families else SHORT
    return [s for s in every if options.all or s.family in families]


def _base_folder(options: argparse.Namespace) -> Path:
    """Where the model that knows all skills is: kept from an earlier run, or trained now."""
    from lfu.study.testbed.model import learn_all_skills

    folder = options.out / f"base-{options.steps}-{_base_key()}"
    if not (folder / "config.json").is_file():
        print(
            f"training the base model from scratch, {options.steps} steps (about 5 minutes on 2 CPU cores)", flush=True
        )
        model = learn_all_skills(0, options.steps, say=lambda line: print(f"  {line}", flush=True))
        with new_folder(folder) as work:
            model.save_pretrained(work)
    return folder


@cache
def _load(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder)


def _results(options: argparse.Namespace, folder: Path, plan: Sequence[tuple[Any, int]]) -> Iterator[dict[str, Any]]:
    """The scores of each run, in order: from its file, or measured now, several at once.

    Raises:
        UserError: a process died.
    """
    tasks = [(folder, _file(options, setting, seed), setting, options.rows, seed) for setting, seed in plan]
    jobs = min(options.jobs, sum(not task[1].is_file() for task in tasks))
    if jobs < 2:
        yield from map(_one, *zip(*tasks))
        return
    try:
        with ProcessPoolExecutor(jobs, get_context("spawn"), _begin_worker) as pool:
            yield from pool.map(_one, *zip(*tasks))
    except BrokenProcessPool as error:
        raise UserError(
            "a process died, perhaps of too little memory: the same command goes on; try --jobs 1"
        ) from error


def _begin_worker() -> None:
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word: the parent says what there is to say


def _file(options: argparse.Namespace, setting: Any, seed: int) -> Path:
    """Where the scores of a run are kept; what decides them is in its name."""
    return options.out / "runs" / f"{_key(options, setting, seed)}.json"


def _one(folder: Path, path: Path, setting: Any, rows: int, seed: int) -> dict[str, Any]:
    """Scores of one run: from its file, or measured now."""
    from lfu.study.testbed.run import fine_tune, measure

    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    with quiet_libraries():
        tuned = fine_tune(_load(folder).state_dict(), setting, rows, seed)
    result = {"scores": measure(tuned)}
    write_text(path, dump_json(result))
    return result


def _key(options: argparse.Namespace, setting: Any, seed: int) -> str:
    """What decides a run's scores."""
    from lfu.study.testbed.run import options_of

    given = [setting.method, options_of(setting), seed, options.rows, options.steps]
    return digest([setting.name, *given, _run_key(), _base_key()])


def _base_key() -> str:
    """What decides the base model beside its steps."""
    from lfu.evaluation.record import versions

    here = Path(__file__).parent
    return digest([of_files(here, [here / "skills.py", here / "model.py"]), versions()])


@cache
def _run_key() -> str:
    package = Path(__file__).parent.parent.parent
    apart = ("cli", "data", "report", "evaluation", "recipes", "study", "demo.py")  # they change no training
    files = [file for file in package.rglob("*.py") if file.relative_to(package).parts[0] not in apart]
    return of_files(package, [*files, Path(__file__).parent / "run.py"])


if __name__ == "__main__":
    sys.exit(main())
