"""Why a step costs more than the unpadded floor: its parts added one after another, each as a share of SFT's time.

The stages that are timed, side by side in interleaved rounds: SFT; SFT with h read; with the zero auxiliary attached,
too; the bare unpadded pass; the second pass's own batch; that with h' read and compared; with the moved auxiliary, too;
the whole step. Neighbours differ by one cause, so the causes add up to what the step takes above SFT and the bare pass.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch

from lfu import LfUStep
from lfu.model.representations import answer_positions
from lfu.model.rng import generators
from lfu.model.row_attention import attention_in
from lfu.step import second_pass
from lfu.step.gradients import SplitGradients
from lfu.step.pieces import Rows
from lfu.step.record import Record
from lfu.step.step import sft_loss
from lfu.undesirable import Own
from stepcost.cases import Case
from stepcost.clock import CLOCKS, Deadline, interleave, paired_ratios, seconds
from stepcost.variants import Run, Variant, lfu_step, make_step, parse_variant, twin_of

ASCENT, GRADIENTS = "ascent", "gradients"
# cause -> the stages whose times are added and those that are taken away
CAUSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "h read in the clean pass": (("read",), ("sft",)),
    "auxiliary: drawn, and its products in the clean pass": (("attached",), ("read",)),
    "second pass: its batch, over the bare unpadded pass": (("trimmed",), ("decoder_unpadded",)),
    "consistency: h' read, compared, its backward": (("compared",), ("trimmed",)),
    "auxiliary: its products in the second pass": (("perturbed",), ("compared",)),
    "ascent": ((ASCENT,), ()),
    "gradients kept apart, compared, checked": ((GRADIENTS,), ()),
    "the rest: python, records": (("step",), ("attached", "perturbed", ASCENT, GRADIENTS)),
}
TOTAL = (("step",), ("sft", "decoder_unpadded"))


def causes_of(
    case: Case,
    variant: Variant,
    model: Any,
    batch: dict[str, torch.Tensor],
    rounds: int,
    deadline: Deadline,
    say: Callable[[str], None],
    clock: str = "wall",
) -> dict[str, float]:
    """Cause -> seconds over SFT's, with `total` for all of them; empty if the deadline left no whole round.

    Args:
        case: of `model` and `batch`.
        variant: an exact one of `KINDS`.
    """
    samples: dict[str, Callable[[], float]] = {
        name: partial(seconds, run, model, case.device, clock) for name, run in _stages(variant, model, batch).items()
    }
    samples |= _timed_parts(variant, model, batch, case.device, clock)
    taken = interleave(samples, rounds, deadline, say)
    if not taken["sft"]:
        return {}
    ratio = paired_ratios(taken, "sft")
    share = lambda more, less: sum(ratio[name] for name in more) - sum(ratio[name] for name in less)
    return {cause: share(*stages) for cause, stages in CAUSES.items()} | {"total": share(*TOTAL)}


def _stages(variant: Variant, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, Run]:
    """The stages in order, each forward and backward."""
    whole = make_step(variant, model, batch)
    stages = {name: make_step(parse_variant(name), model, batch) for name in ("sft", "decoder_unpadded")}
    stages |= _clean_stages(lfu_step(variant, twin_of(model), len(batch["labels"])), batch)
    stages |= _second_stages(lfu_step(variant, twin_of(model), len(batch["labels"])), batch)
    return stages | {"step": whole}


def _clean_stages(step: LfUStep, batch: dict[str, torch.Tensor]) -> dict[str, Run]:
    where = answer_positions(batch["labels"], step.settings.positions)

    def clean(attached: bool) -> None:
        if attached:
            step.auxiliary.reset(generators(step.settings.seed, 0))
        with step.auxiliary.attached() if attached else nullcontext(), step.reader.reading(where, detach=True):
            sft_loss(step.model, batch, len(where)).backward()

    return {"read": Run(partial(clean, False)), "attached": Run(partial(clean, True))}


def _second_stages(step: LfUStep, batch: dict[str, torch.Tensor]) -> dict[str, Run]:
    """The second pass with an auxiliary that one ascent moved; `own` moves theta, which costs no product: left out."""
    step(batch)  # from here on it knows whether dropout is drawn, and so whether it may trim
    where = answer_positions(batch["labels"], step.settings.positions)
    micro = second_pass.plan(step, batch, where, len(where), 0)
    step.auxiliary.reset(generators(step.settings.seed, 0))
    with step.auxiliary.attached(), step.reader.reading(where, detach=True) as clean:
        sft_loss(step.model, batch, len(where)).backward()
    target = step.term.target(clean)
    if not isinstance(step.auxiliary, Own):
        step._ascend(Record(tokens=len(where)), step.auxiliary.take_gradients(), batch, micro)
        step.auxiliary.freeze()
    rows = Rows(batch, where, target)

    def trimmed() -> None:
        second = second_pass.smaller(step, rows)
        inputs = {name: value for name, value in second.batch.items() if name != "labels"}
        with attention_in(second.rows, step.model.config):
            step.anatomy.decoder(**inputs, use_cache=False).last_hidden_state.sum().backward()

    def compared(attached: bool) -> None:
        with step.auxiliary.attached() if attached else nullcontext(), second_pass.read(step, micro, rows) as moved:
            second_pass.backward(step, Record(tokens=len(where), lam=1.0), micro, target, moved)

    return {
        "trimmed": Run(trimmed),
        "compared": Run(partial(compared, False)),
        "perturbed": Run(partial(compared, True)),
    }


def _timed_parts(
    variant: Variant, model: Any, batch: dict[str, torch.Tensor], device: str, clock: str
) -> dict[str, Callable[[], float]]:
    """What the step spends on the ascent and on theta's gradients, by the clock inside it."""
    step = lfu_step(variant, twin_of(model), len(batch["labels"]))
    spent: dict[str, float] = defaultdict(float)

    def ascent() -> float:
        spent.clear()
        model.zero_grad()
        with (
            _timing(step, "_ascend", spent, ASCENT, device, clock),
            _timing(second_pass, "compare", spent, GRADIENTS, device, clock),
            _timing(step, "end", spent, GRADIENTS, device, clock),
            _timing(SplitGradients, "join", spent, GRADIENTS, device, clock),
            _timing(SplitGradients, "narrow", spent, GRADIENTS, device, clock),
        ):
            step(batch)
        return spent[ASCENT]

    return {ASCENT: ascent, GRADIENTS: lambda: spent[GRADIENTS]}


@contextmanager
def _timing(owner: Any, name: str, spent: dict[str, float], part: str, device: str, clock: str) -> Iterator[None]:
    """Within it, calls of `owner.name` add their seconds to `spent[part]`."""
    original = getattr(owner, name)

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return CLOCKS[clock]()

    def timed(*positional: Any, **named: Any) -> Any:
        start = now()
        try:
            return original(*positional, **named)
        finally:
            spent[part] += now() - start

    with mock.patch.object(owner, name, timed):
        yield
