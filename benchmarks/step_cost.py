"""What one LfU step costs beside one SFT step: time, memory, arithmetic, measured side by side in one run.

    python benchmarks/step_cost.py                                     # the main table: make bench
    python benchmarks/step_cost.py --preset cheaper                    # the approximate forms
    python benchmarks/step_cost.py --preset curves --plots docs        # cost along batch, length, size, layers, rank
    python benchmarks/step_cost.py --variants sft decoder lora lora:layers=early --profile
    python benchmarks/step_cost.py --device cuda --preset gpu --minutes 5 --json gpu.json --markdown gpu.md
    python benchmarks/step_cost.py --floors 135m 1.7b 8b               # arithmetic alone, counted on the meta device

A variant is a name, with options of LfUStep behind it: sft, trainer (SFTTrainer's training_step), oracle (3F+3B),
decoder (the second pass at its barest), decoder_unpadded, lora, steering, own (LfUStep), sam or another method
(LfUTrainer). lora:every=2 is LfUStep(model, auxiliary="lora", every=2).

Time is forward and backward of one micro-batch, without the optimizer: by the clock on the wall, with --clock cpu the
processor time (one thread on a machine that others use too), on a GPU between CUDA events. Rounds are interleaved: each
variant once a round, its time divided by SFT's of the same round, the median of these ratios reported with its
quartiles. An approximate form is timed over a whole cycle of micro-batches (every=4: four), divided by their number; of
one that draws rows or layers, four micro-batches whose draw costs what it does on average. Memory is the peak of two
AdamW updates of two micro-batches, the resident set of a process of its own; on a GPU what the allocator gave out for
two micro-batches, without the optimizer.
The floor is SFT plus a forward and backward of the decoder without the head: stepcost/flops.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402
from stepcost.cases import AXES, SIZES, Case  # noqa: E402
from stepcost.clock import CLOCKS, Deadline  # noqa: E402
from stepcost.curves import cases_of, first_cases, parse_curve  # noqa: E402
from stepcost.flops import floors  # noqa: E402
from stepcost.measure import Plan, measure_all  # noqa: E402
from stepcost.memory import clear, of_this_process  # noqa: E402
from stepcost.plots import save_plots  # noqa: E402
from stepcost.presets import PRESETS  # noqa: E402
from stepcost.profiling import profile_case  # noqa: E402
from stepcost.tables import floor_table, markdown  # noqa: E402
from stepcost.variants import Variant, parse_variant  # noqa: E402

from lfu.evaluation.record import machine  # noqa: E402
from lfu.support.files import dump_json, write_text  # noqa: E402
from lfu.undesirable import KINDS  # noqa: E402


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="main", help="flags under those given (main)")
    parser.add_argument("--theta", nargs="+", choices=("lora", "full"))
    parser.add_argument("--variants", nargs="+", type=_checked(parse_variant), metavar="V", help="see above")
    parser.add_argument(
        "--curve",
        nargs="+",
        type=_checked(parse_curve),
        metavar="AXIS=V,V",
        help="length=64,128 or size=30m,70m@batch=1",
    )
    parser.add_argument("--size", choices=list(SIZES))
    parser.add_argument("--batch", type=_at_least_one, metavar="N")
    parser.add_argument("--length", type=_at_least_one, metavar="N", help="tokens per row, padding included")
    parser.add_argument("--layers", type=_at_least_one, metavar="N", help="default: the size's own")
    parser.add_argument("--rank", type=_at_least_one, metavar="N", help="of theta's LoRA (8)")
    parser.add_argument("--rounds", type=_at_least_one, metavar="N")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), help="cpu: processor time, for one thread on a shared machine (wall)"
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false", default=None)
    parser.add_argument("--no-flops", dest="flops", action="store_false", default=None)
    parser.add_argument("--profile", action="store_true", default=None, help="the time over the floor by cause")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop by then, with what there is")
    parser.add_argument("--case-seconds", type=float, metavar="S", help="the most that one case or profile may take")
    parser.add_argument("--json", metavar="FILE", help="write the result there; - for stdout")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables there (default: stdout)")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write step-cost-AXIS.png there")
    parser.add_argument(
        "--from-json", type=Path, metavar="FILE", help="measure nothing: tables and plots of that result"
    )
    parser.add_argument("--floors", nargs="+", choices=list(SIZES), metavar="SIZE", help="count alone, run nothing")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    return parser


def settings_of(given: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The preset's settings under those given."""
    common: dict[str, Any] = {
        "size": "135m", "batch": 4, "length": 128, "layers": None, "rank": 8, "dtype": "float32", "memory": True,
        "flops": True, "profile": False, "curve": [], "clock": "wall", "also": [], "case_seconds": None,
    }  # fmt: skip
    said = {k: v for k, v in vars(given).items() if v is not None}
    chosen = common | PRESETS[given.preset] | said
    if said.keys() & {"theta", "variants", "curve", *AXES} or said.get("memory") is False:
        chosen["also"] = []  # these cases belong to the preset as it is
    if "variants" in said:
        chosen.pop("curve_variants", None)
    for name in ("variants", "curve_variants"):
        if name in chosen:
            chosen[name] = [parse_variant(v) if isinstance(v, str) else v for v in chosen[name]]
    if "sft" not in (v.text for v in chosen["variants"]):
        parser.error("--variants must include sft: the ratios are to it")
    if chosen["device"] == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return chosen


def base_case(settings: dict[str, Any]) -> Case:
    """The case that the flags give, of the first theta."""
    return Case(**{name: settings[name] for name in ("size", "batch", "length", "layers", "rank", "dtype", "device")})


def jobs_of(settings: dict[str, Any]) -> list[tuple[Case, Plan]]:
    """The first case of each theta, those along the curves, and the preset's further ones, each with its plan."""
    first = first_cases(settings["theta"], base_case(settings))
    jobs = []
    for case in cases_of(first, settings["curve"]):
        changed = {name for name in AXES if getattr(case, name) != getattr(first[0], name)}
        variants = settings.get("curve_variants", settings["variants"]) if changed else settings["variants"]
        memory = settings["memory"] if isinstance(settings["memory"], bool) else changed <= {settings["memory"]}
        jobs.append((case, _plan(settings, variants, settings["rounds"], memory)))
    for more in settings["also"]:
        changes = {name: value for name, value in more.items() if name not in ("variants", "rounds")}
        variants = [parse_variant(text) for text in more["variants"]]
        jobs.append((replace(first[0], **changes), _plan(settings, variants, more["rounds"], True)))
    return jobs


def _plan(settings: dict[str, Any], variants: list[Variant], rounds: int, memory: bool) -> Plan:
    return Plan(
        variants, rounds, memory, settings["flops"], Path(__file__), settings["clock"], settings["case_seconds"]
    )


def measure(settings: dict[str, Any], result: dict[str, Any]) -> None:
    """Everything that was asked for, into `result`; written out after each case."""
    deadline = Deadline(settings.get("minutes"))
    measure_all(jobs_of(settings), deadline, _say, result, lambda: write(result, settings, final=False))
    for one in first_cases(settings["theta"], base_case(settings)) if settings["profile"] else []:
        if deadline.passed:
            result["stopped"] = result.get("stopped") or "out of time before the profile"
            break
        _say(f"{one}: profile")
        chosen = [v for v in settings["variants"] if v.name in KINDS and _is_exact(v)]
        limit = deadline.within(settings["case_seconds"])
        before = result["profiles"]

        def keep(found: dict[str, Any], before: list[Any] = before) -> None:
            result["profiles"] = [*before, found]
            write(result, settings, final=False)

        profile_case(one, chosen, settings["rounds"], limit, _say, settings["clock"], keep)
        clear()


def _is_exact(variant: Variant) -> bool:
    """Only such a step has the parts that the profile tells apart."""
    return not {"every", "part", "stale", "random_layers", "budget"} & variant.options.keys()


def new_result(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "what": "cost of a step; ratios to SFT, medians of interleaved rounds",
        "command": " ".join(["python", "benchmarks/step_cost.py", *sys.argv[1:]]),
        "dtype": settings["dtype"],
        "clock": "CUDA events" if settings["device"] == "cuda" else settings["clock"],
        "rounds": settings["rounds"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": machine(),
        "cases": [],
        "profiles": [],
    }


def write(result: dict[str, Any], settings: dict[str, Any], *, final: bool = True) -> None:
    """The files that were asked for; on stdout only what is final."""
    for target, text in ((settings.get("json"), dump_json(result)), (settings.get("markdown"), markdown(result))):
        if target and target != "-":
            write_text(Path(target), text.rstrip() + "\n")
        elif target and final:
            print(text)
    if final and not settings.get("json") and not settings.get("markdown"):
        print(markdown(result))
    if final and settings.get("plots"):
        for file in save_plots(result, settings["plots"]):
            _say(f"plot {file}")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    given = parser.parse_args(argv)
    if given.memory_of:
        print(json.dumps(of_this_process(json.loads(given.memory_of[0]), given.memory_of[1])))
        return
    transformers.utils.logging.set_verbosity_error()
    if given.from_json:
        write(json.loads(given.from_json.read_text()), {k: v for k, v in vars(given).items() if v is not None})
        return
    settings = settings_of(given, parser)
    if given.floors:
        cases = [
            Case(theta, size, settings["batch"], settings["length"], rank=settings["rank"])
            for theta in settings["theta"] for size in given.floors
        ]  # fmt: skip
        print(floor_table([{"case": asdict(case), "floor": floors(case)} for case in cases]))
        return
    result = new_result(settings)
    try:
        measure(settings, result)
    except KeyboardInterrupt:
        result["stopped"] = "interrupted"
    write(result, settings)


def _checked(parse: Any) -> Any:
    def checked(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def _at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
