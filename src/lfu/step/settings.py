"""The settings of the step, each named, explained and checked once: for `LfUStep`, `LfUConfig` and the command line."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, TypeVar, Union, get_type_hints

from lfu.step.cheaper import Cheaper
from lfu.support.choices import number, optional, refuse_unread, setting, whole

C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class StepSettings(Cheaper):
    """How an LfU step is taken. The defaults are the paper's; `help` in a field's metadata says what it does.

    Raises:
        ValueError: any value outside its range, with the name of the setting and what it may be.
    """

    alpha: Union[float, str] = setting(  # noqa: UP007 (as HfArgumentParser reads it)
        "auto",
        "Length of each normalised ascent step (Eq. 2), > 0. 'auto': the paper's 0.1, or longer if the hidden "
        "states' dtype is too coarse for it, as in bfloat16; lam is then divided by the same factor.",
        number(auto=True),
    )
    lam: Union[float, str] = setting(  # noqa: UP007 (as HfArgumentParser reads it)
        5.0,
        "Weight lambda of the consistency term (Eq. 6), >= 0; 0 is plain SFT, nothing attached; 'auto' keeps the "
        "gradient ratio at `strength`. The first micro-batch only measures.",
        number(zero=True, auto=True),
    )
    strength: float = setting(0.5, "Target of lam='auto': ||grad(lam * consistency)|| / ||grad(SFT)||, > 0.", number())
    layers: str = setting("all", "Compared layers: all, early, middle, late (thirds), or a range '5-12'.")
    blocks: str | None = setting(
        None,
        "Where the model keeps its list of blocks, if it is not found: a dotted path in the decoder, such as 'layers'.",
        shared=True,
    )
    final_norm: bool = setting(
        True, "Compare the last layer after the final norm, like transformers' hidden_states[K]."
    )
    positions: str = setting(
        "predict",
        "Compared tokens: predict (positions that predict answer tokens: paper) or answer (code).",
        words=("predict", "answer"),
    )
    direction: str = setting(
        "perturbed",
        "Where the consistency gradient flows: perturbed (through h': paper, 2F+2B) or clean (through h, as in the "
        "authors' RepS code, 3F+2B; pulls the model towards the undesirable).",
        words=("perturbed", "clean"),
    )
    ascent_batch: str = setting(
        "same",
        "Batch for the ascent: same, or independent (drawn from a second shuffle; 3F+3B).",
        words=("same", "independent"),
    )
    ascent_steps: int = setting(
        1,
        "Number of normalised ascent steps (Eq. 2), >= 1; each one after the first costs a forward and a backward.",
        whole(1),
    )
    ascent_scope: str = setting(
        "global",
        "With several processes, the ascent (LfU's, SAM's) follows the gradient of all of them (global), or each its "
        "own (local).",
        words=("global", "local"),
        shared=True,
    )
    same_dropout: bool = setting(
        True,
        "Use the same dropout masks and embedding noise in both passes. Otherwise h' - h is mostly the "
        "difference of two random masks.",
    )
    trim: bool = setting(
        True,
        "Leave padding, and what follows the last compared token, out of the second pass: the same gradients for less "
        "work. Has no effect while dropout or embedding noise is on.",
    )
    budget: float | None = setting(
        None,
        "APPROXIMATE, cheaper: the cost per step that you want, as a multiple of SFT's, > 1; picks one of every, part, "
        "stale and random_layers, and says which.",
        optional(("a finite number > 1 (1 is plain SFT)", lambda v: isinstance(v, (int, float)) and 1 < v < inf)),
    )
    on_bad_batch: str = setting(
        "skip",
        "On no labelled token, a zero ascent gradient or non-finite values: skip LfU and record why, or raise.",
        words=("skip", "raise"),
    )
    seed: int = setting(42, "Seed of the auxiliary's random parts.", shared=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lam not in ("auto", 0) and self.strength != type(self).strength:
            raise ValueError(
                f"strength={self.strength:g} is the target of lam='auto', and lam={self.lam:g} is fixed: drop one"
            )
        if self.budget is not None and not self.exact:
            raise ValueError(f"budget={self.budget:g} picks the approximate form itself: drop {self}")
        if self.lam == 0 and not (self.exact and self.budget is None):
            what = str(self) or f"budget={self.budget:g}"
            raise ValueError(f"{what} makes LfU's second pass cheaper, and lam=0 has none: drop it")

    def refuse_ignored(self, *parts: Any) -> None:
        """Raises ValueError for a setting that this auxiliary or consistency `ignores`."""
        unread = {
            name: f"{type(part).__name__} does not use it" for part in parts for name in getattr(part, "ignores", ())
        }
        refuse_unread(self, unread)


def with_fields_of(source: type) -> Callable[[C], C]:
    """Below `@dataclass`: gives a class the fields of another dataclass, but for those that it has already."""

    def give(cls: C) -> C:
        own = {name for base in cls.__mro__ for name in vars(base).get("__annotations__", {})}
        hints = get_type_hints(source)
        for f in fields(source):
            if f.name not in own:
                cls.__annotations__[f.name] = hints[f.name]
                setattr(cls, f.name, field(default=f.default, metadata={"help": f.metadata["help"]}))
        return cls

    return give
