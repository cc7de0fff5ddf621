"""`python -m lfu.study.testbed`: every method on the controlled test bed, over several seeds, with a report.

A Llama of a million parameters learns seven skills from scratch; an eighth, a composition of two of them, is then
fine-tuned on few rows by each method. The base model and every finished run are kept in the output folder: a killed
study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from lfu.errors import UserError
from lfu.files import dump_json, new_folder, write_text
from lfu.quiet import quiet_libraries
from lfu.study.keys import digest, of_files


def main(argv: list[str] | None = None) -> int:
    """Runs the study. Returns 0, 2 for what the user can put right, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m lfu.study.testbed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/testbed"), help="folder for runs and report")
    parser.add_argument("--seeds", type=int, default=8, help="seeds: training rows, their order, all that is random")
    parser.add_argument("--rows", type=int, default=64, help="rows that are fine-tuned on")
    parser.add_argument("--steps", type=int, default=3000, help="steps in which the base model learns all skills")
    parser.add_argument("--families", nargs="+", help="only these curves (and SFT): lfu, kl, ...")
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
    from lfu.study.testbed.settings import settings

    chosen = [s for s in settings() if not options.families or s.family in ("sft", *options.families)]
    if unknown := set(options.families or []) - {s.family for s in settings()}:
        raise UserError(f"unknown family {sorted(unknown)[0]!r}: use {', '.join({s.family: 0 for s in settings()})}")
    base = _base(options)
    plan = [(setting, seed) for seed in range(options.seeds) for setting in chosen]
    runs = []
    for number, (setting, seed) in enumerate(plan, start=1):
        result = _one(options, base, setting, seed)
        runs.append({"name": setting.name, "family": setting.family, "seed": seed, **result})
        scored = result["scores"]
        print(
            f"[{number}/{len(plan)}] {setting.name}, seed {seed}: target {scored['target']['accuracy']:.1%}, "
            f"others {scored['others']['accuracy']:.1%}",
            flush=True,
        )
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


def _base(options: argparse.Namespace) -> Any:
    """The model that knows all skills: kept from an earlier run, or trained now."""
    from transformers import LlamaForCausalLM

    from lfu.study.testbed.model import learn_all_skills

    folder = options.out / f"base-{options.steps}-{_base_key()}"
    if not (folder / "config.json").is_file():
        print(
            f"training the base model from scratch, {options.steps} steps (about 5 minutes on 2 CPU cores)", flush=True
        )
        model = learn_all_skills(0, options.steps, say=lambda line: print(f"  {line}", flush=True))
        with new_folder(folder) as work:
            model.save_pretrained(work)
    return LlamaForCausalLM.from_pretrained(folder)


def _one(options: argparse.Namespace, base: Any, setting: Any, seed: int) -> dict[str, Any]:
    """Scores of one run: from its file, or measured now."""
    from lfu.study.testbed.run import fine_tune, measure

    path = options.out / "runs" / f"{_key(options, setting, seed)}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    tuned = fine_tune(base.state_dict(), setting, options.rows, seed)
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
