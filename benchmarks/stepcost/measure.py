"""One case measured, and many: results grow case by case, and are handed on after each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lfu.support.errors import one_line
from stepcost.cases import Case, make_batch, make_model
from stepcost.clock import Deadline, interleave, paired, paired_ratios, quartiles, seconds
from stepcost.flops import count, floors
from stepcost.memory import clear, on_gpu, peak_memory
from stepcost.variants import Variant, make_step

Say = Callable[[str], None]
# floor -> the variant that is its second pass
DECODERS = {"padded": "decoder", "unpadded": "decoder_unpadded"}


@dataclass(frozen=True)
class Plan:
    """How each case is measured.

    Attributes:
        variants: `sft` among them.
        rounds: counted ones; one more warms up.
        memory, flops: whether to measure them.
        script: what a process that measures memory runs.
        clock: `wall` or `cpu`.
        seconds: what a case may take; None: until the deadline of them all.
    """

    variants: Sequence[Variant]
    rounds: int
    memory: bool
    flops: bool
    script: Path
    clock: str = "wall"
    seconds: float | None = None


def measure_case(case: Case, plan: Plan, deadline: Deadline, say: Say) -> dict[str, Any] | None:
    """Seconds, ratios to SFT with their quartiles, FLOPs, memory, floors; None if the deadline left no whole round.

    `over_floor` is relative to the measured time of SFT and the bare second pass together: by how much more.

    A variant that can't run (too little memory, a method that refuses this theta) is named in `failed` with the reason.
    """
    failed: dict[str, str] = {}
    memory: dict[str, dict[str, float]] = {}
    taken, flops = _time_and_count(case, plan, deadline, say, failed, memory)
    clear()
    if not taken.get("sft"):
        return {"case": asdict(case), "failed": failed} if failed else None
    found: dict[str, Any] = {
        "case": asdict(case),
        "floor": floors(case),
        "rounds": len(taken["sft"]),
        "seconds": {name: statistics.median(times) for name, times in taken.items()},
        "ratio": paired_ratios(taken, "sft"),
        "quartiles": {name: quartiles(ratios) for name, ratios in paired(taken, "sft").items()},
        "over_floor": {
            floor: {name: ratio - 1 for name, ratio in paired_ratios(taken, "sft", decoder).items()}
            for floor, decoder in DECODERS.items()
            if decoder in taken
        },
        "flops": flops,
        "failed": failed,
    }
    if case.device == "cuda":
        found["memory_mb"] = memory
    elif plan.memory:
        found["memory_mb"] = _memories(case, plan, deadline, say, failed)
    return found


def _time_and_count(
    case: Case, plan: Plan, deadline: Deadline, say: Say, failed: dict[str, str], memory: dict[str, dict[str, float]]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    try:
        model = make_model(case)
    except Exception as error:  # out of memory comes as several types
        failed["model"] = one_line(error)
        return {}, {}
    loaded = torch.cuda.memory_allocated() if case.device == "cuda" else 0
    batch = make_batch(case.batch, case.length, case.shape["vocab_size"], case.device)
    samples: dict[str, Callable[[], float]] = {}
    flops: dict[str, float] = {}
    for variant in plan.variants:
        if deadline.passed:
            return {}, {}
        try:
            with on_gpu(memory, variant.text, loaded):
                run = make_step(variant, model, batch)
                if plan.flops:
                    flops[variant.text] = count(run.sample) / run.calls
                else:
                    run()
                if case.device == "cuda":
                    run()  # its peak beside the gradients of an earlier micro-batch
            samples[variant.text] = partial(seconds, run, model, case.device, plan.clock)
        except Exception as error:
            failed[variant.text] = one_line(error)[:300]
            say(f"{case}: {variant.text} left out: {failed[variant.text]}")
        model.zero_grad()
        clear()
    if "sft" not in samples:
        return {}, {}
    return interleave(samples, plan.rounds, deadline, lambda text: say(f"{case}: {text}")), flops


def _memories(case: Case, plan: Plan, deadline: Deadline, say: Say, failed: dict[str, str]) -> dict[str, Any]:
    found = {}
    for variant in plan.variants:
        if variant.text in failed or deadline.passed or variant.name in DECODERS.values():  # these are no steps
            continue
        say(f"{case}: memory of {variant.text}")
        try:
            found[variant.text] = peak_memory(case, variant, plan.script)
        except Exception as error:
            failed[f"memory of {variant.text}"] = one_line(error)[:300]
            clear()
    return found


def measure_all(
    jobs: Sequence[tuple[Case, Plan]],
    deadline: Deadline,
    say: Say,
    result: dict[str, Any],
    keep: Callable[[], None],
) -> None:
    """Adds each case to `result["cases"]` and calls `keep` after it; stops at the deadline, and says so there.

    A case that is out of its own time costs only itself: `result["cut"]` names it where it has no whole round.
    """
    for number, (case, plan) in enumerate(jobs):
        found = None if deadline.passed else measure_case(case, plan, deadline.within(plan.seconds), say)
        if found is not None:
            result["cases"].append(found)
        elif not deadline.passed:
            result.setdefault("cut", []).append(f"{case}: no whole round in {plan.seconds:g} s")
        if deadline.passed and (found is None or number + 1 < len(jobs)):
            result["stopped"] = f"out of time after {len(result['cases'])} of {len(jobs)} cases"
            keep()
            return
        keep()
