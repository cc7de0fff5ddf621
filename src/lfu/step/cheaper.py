"""The approximate forms of the consistency: each costs less than the exact 2F+2B, and none is on unless asked for.

Which one a run uses, what each costs, and what is drawn for a micro-batch. What they change is told in docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from lfu.model.anatomy import whole_shape
from lfu.model.rng import draws_masks
from lfu.support.choices import SHARE, check, setting, whole

if TYPE_CHECKING:
    from lfu.step.step import LfUStep


@dataclass(frozen=True)
class Cheaper:
    """Which approximate form is used; the defaults are the exact step.

    `every`: lazy regularisation (Karras et al. 2020, arXiv 1912.04958); the k-fold weight keeps the size of the sum of
    the gradients over k updates. `part`: weighted so that the mean stays. `stale`: see `lfu.step.first_order`.
    `random_layers`: past the end of the range it goes on at the start, so that the perturbed forward often stops early.

    Raises ValueError: a value outside its range, or two that can't be combined.
    """

    every: int = setting(1, "APPROXIMATE, cheaper: LfU on every k-th update only, with k times the weight.", whole(1))
    part: float = setting(
        1.0,
        "APPROXIMATE, cheaper: perturbed pass on this share of the answered rows, drawn for each micro-batch. Not with "
        "dropout or embedding noise, which belong to the whole micro-batch, unless same_dropout is off.",
        SHARE,
    )
    stale: int = setting(
        0,
        "APPROXIMATE, cheaper: an exact step on every k-th micro-batch; those in between reuse its ascent direction, "
        "in the first-order form (2F+1B). 0: off.",
        whole(2, off=True),
    )
    random_layers: int = setting(
        0, "APPROXIMATE, cheaper: compare n neighbouring layers, drawn at random. 0: off.", whole(1, off=True)
    )

    def __post_init__(self) -> None:
        check(self)
        if self.stale and self.every > 1:
            raise ValueError(
                f"stale={self.stale} with every={self.every}: the direction would be several updates old; use one"
            )

    @property
    def form(self) -> Cheaper:
        """These four alone."""
        return Cheaper(*(getattr(self, f.name) for f in fields(Cheaper)))

    @property
    def exact(self) -> bool:
        return self.form == Cheaper()

    def cycle(self, accumulation: int = 1) -> int:
        """Updates after which the cost of an update repeats; `accumulation`: micro-batches of an update."""
        return self.stale // math.gcd(self.stale, accumulation) if self.stale else self.every

    def __str__(self) -> str:
        """The settings that are on, as in `every=4, part=0.5`; empty for the exact step."""
        set_ = [f for f in fields(Cheaper) if getattr(self, f.name) != f.default]
        return ", ".join(f"{f.name}={getattr(self, f.name):g}" for f in set_)


# -- what is drawn -----------------------------------------------------------------------------------------------------


def generator(seed: int, index: int) -> torch.Generator:
    """The randomness of micro-batch `index`, apart from that of the auxiliaries."""
    return torch.Generator().manual_seed((seed * 0x94D049BB133111EB + index * 0xD6E8FEB86659FD93 + 1) % 2**63)


def draw_rows(where: torch.Tensor, width: int, part: float, source: torch.Generator) -> tuple[torch.Tensor, float]:
    """The positions `where` (flat indices into B x width) of a random share of the rows that have any.

    With them comes what their token sums are multiplied by, so that the expectation is the sum over all.
    """
    rows = (where // width).cpu()
    answered = rows.unique()
    count = max(1, round(part * len(answered)))
    if count >= len(answered):
        return where, 1.0
    chosen = answered[torch.randperm(len(answered), generator=source)[:count]]
    return where[torch.isin(rows, chosen).to(where.device)], len(answered) / count


def draw_layers(layers: Sequence[int], count: int, source: torch.Generator) -> list[int]:
    """`count` neighbours of `layers`, as a ring: each layer is as likely as any, so the mean over them is unbiased."""
    start = int(torch.randint(len(layers), (), generator=source))
    return sorted(layers[(start + i) % len(layers)] for i in range(count))


# -- what fits the run -------------------------------------------------------------------------------------------------


def refuse_form(step: LfUStep) -> None:
    """Raises ValueError for an approximate form that does not fit the model or the other settings."""
    s, compared = step.settings, len(step.reader.layers)
    if s.random_layers >= compared and s.random_layers:
        raise ValueError(f"random_layers={s.random_layers} of {compared} compared layers leaves none out: give fewer")
    if s.part < 1 and replays_masks(step):
        raise ValueError(part_saves_nothing(s.part))
    if not s.stale:
        return
    if s.direction == "clean":
        raise ValueError("stale is the first-order form of direction='perturbed': drop direction='clean'")
    if not step.auxiliary.can_be_kept:
        name = type(step.auxiliary).__name__
        raise ValueError(f"stale needs an auxiliary with `kept` and `restore`, and {name} has none")
    head = step.anatomy.model.get_output_embeddings()
    if step.term.reads_logits and (not step.term.head_stays or any(p.requires_grad for p in head.parameters())):
        raise ValueError("stale with logit_kl needs a head that is not trained, as under LoRA: drop one of the two")


def replays_masks(step: LfUStep) -> bool:
    """Whether the second pass must see the clean pass's dropout masks. Embedding noise shows only when drawn."""
    model = step.anatomy.model
    return step.settings.same_dropout and draws_masks(model, model.config.get_text_config())


def part_saves_nothing(part: float) -> str:
    return (
        f"part={part:g} with dropout or embedding noise saves nothing, as the second pass draws the masks of the whole "
        "micro-batch: use every or random_layers, take the noise away, or set same_dropout=False"
    )


def settle_budget(step: LfUStep, rows: int, noise: bool = False, alone: bool = True) -> None:
    """The step's `budget` becomes one of the forms, once, for micro-batches of so many rows.

    `noise`: the embeddings will have some, as NEFTune's. `alone`: the model won't be put into a wrapper of several
    processes, where `stale` can't run.
    """
    s = step.settings
    stale = step.auxiliary.can_be_kept and s.direction == "perturbed" and not step.term.reads_logits
    if replays_masks(step) or (noise and s.same_dropout):
        rows = 1  # no `part`: the second pass keeps its shape
    assert step.budget is not None
    step.cheaper = within(step.budget, Sizes.of(step, rows), stale and alone and step.processes.alone)
    step.budget = None


# -- what it costs, and budget= ----------------------------------------------------------------------------------------

# What the LoRA auxiliary (r = 8, d = 576), the reading and the bookkeeping cost beside the passes, of the whole
# micro-batch, as a share of an SFT step: estimated. Other auxiliaries cost less.
BESIDE = 0.15


@dataclass(frozen=True)
class Sizes:
    """What the cost of a form depends on."""

    full: bool  # theta is most of the blocks' weights, not an adapter
    rows: int  # of a micro-batch
    layers: Sequence[int]  # compared, neighbours in 1..depth
    depth: int  # K, the number of layers

    @classmethod
    def of(cls, step: LfUStep, rows: int) -> Sizes:
        weights = [p for block in step.anatomy.blocks for p in block.parameters()]
        sizes = [(whole_shape(p).numel(), p.requires_grad) for p in weights]
        full = 2 * sum(size for size, trained in sizes if trained) > sum(size for size, _ in sizes)
        return cls(full, rows, step.reader.layers, len(step.anatomy.blocks))

    def mean_depth(self, count: int) -> float:
        """Mean share of the model up to the highest compared layer, of all or (`random_layers`) of `count` drawn."""
        if not count:
            return self.layers[-1] / self.depth
        ends = (min(start + count, len(self.layers)) for start in range(len(self.layers)))  # past the end, see above
        return sum(self.layers[end - 1] for end in ends) / len(self.layers) / self.depth


def cost(form: Cheaper, sizes: Sizes) -> float:
    """Arithmetic of a step, as a multiple of an SFT step, counted in passes.

    A backward costs one forward where theta is an adapter, two where it is all weights. The head, which the second
    pass leaves out, is counted in: models with a large vocabulary cost less than this.
    """
    forward = 1 / (3 if sizes.full else 2)  # of an SFT step
    second = max(1, round(form.part * sizes.rows)) / sizes.rows * sizes.mean_depth(form.random_layers)
    exact = BESIDE + second  # `part` spares nothing of what is beside the second pass
    if form.stale:
        return 1 + (exact + (form.stale - 1) * second * forward) / form.stale
    return 1 + exact / form.every


def longest_cycle(form: Cheaper, budget: float | None, accumulation: int = 1) -> int:
    """As `Cheaper.cycle`, for a run whose `budget` is yet to pick its form: the longest that it may come to."""
    return form.cycle(accumulation) if budget is None else max(8, math.ceil((1 + BESIDE) / (budget - 1)))


def within(budget: float, sizes: Sizes, stale: bool = True) -> Cheaper:
    """The first form of this list whose `cost` is within `budget`: the exact step; `part`, as many rows as fit;
    `random_layers`, a quarter of them; `stale` 4, then 8, where it can be used; `every`, the lowest k that fits.

    In this order because `part` and `random_layers` act on every update, exactly and unbiased, `stale` is first order
    in alpha, and `every` acts in bursts.
    """
    forms = [Cheaper(), *(Cheaper(part=count / sizes.rows) for count in range(sizes.rows - 1, 0, -1))]
    forms += [Cheaper(random_layers=len(sizes.layers) // 4)] if len(sizes.layers) >= 8 else []
    forms += [Cheaper(stale=4), Cheaper(stale=8)] if stale else []
    price = cost(Cheaper(), sizes) - 1
    forms += [Cheaper(every=max(2, math.ceil(price / (budget - 1) - 1e-9)))]
    return next(form for form in forms if cost(form, sizes) <= budget + 1e-9)
