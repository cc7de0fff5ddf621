"""What the user asks of a study. Every field with a help text is a flag of `lfu compare` and `lfu sweep`."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfu.support.flags import at_least_one, flag, not_negative, rates_of, seeds_of, share_of, some_of, yes_or_no

if TYPE_CHECKING:
    from lfu.study.choose import Bisection
    from lfu.study.live import Board
    from lfu.study.settings import Setting

MEASURES = ("gain", "forgetting", "prompts", "noise", "distance")
WHAT, ROWS, MEASURED, HOW = "what is compared", "rows", "what is measured", "how"

Draw = Callable[[str, Sequence[Mapping[str, Any]]], bytes]


@dataclass(kw_only=True)
class Options:
    """What the user asked for."""

    folder: Path
    settings: Sequence[Setting]  # what is compared, plain SFT or not
    flags: Mapping[str, Sequence[str]]  # field of `lfu train` -> the words that set it
    knobs: Mapping[str, str]  # `method.knob` -> value
    live: Board  # is told what happens in this process, and shows it
    bisection: Bisection | None = None
    skip_larger: bool = False  # leave out settings with more rows than there are, if others have fewer
    session: str = field(default_factory=lambda: secrets.token_hex(8))  # of the processes of one command
    choose: Callable[[int], list[str]] | None = None  # flags of `lfu train` for so many training rows
    draw: Draw | None = None  # makes the picture (PNG) of a training curve, of its title and entries

    seeds: list[int] = flag(
        WHAT, [0, 1, 2], "how many seeds, or a list of them: 3 means 0,1,2 (default: 3)", type=seeds_of
    )
    learning_rates: list[str] = flag(
        WHAT, [], "try these with each setting, with the first seed, and keep the best on the validation rows "
        "(default: only --learning_rate)", type=rates_of,
    )  # fmt: skip
    halving: bool = flag(
        WHAT, False, "drop weak settings and learning rates after short trainings with the first seed; a third remains "
        "each time, and only the last ones are trained in full", type=yes_or_no, nargs="?", const=True,
    )  # fmt: skip
    equal: str = flag(
        WHAT, "steps", "what is equal for all methods: training steps, or the time of plain SFT's run (default: steps)",
        choices=["steps", "time", "both"],
    )  # fmt: skip
    test_rows: int | None = flag(
        ROWS, None, "rows of --data to split off for the test, if no --eval_data is given", type=at_least_one
    )
    validation_rows: int | None = flag(
        ROWS, None, "rows of --data to split off for choosing settings (default: a tenth, 8 to 200)", type=at_least_one
    )
    validation_data: str | None = flag(ROWS, None, "rows for choosing, instead of splitting some off", metavar="DATA")
    measures: list[str] = flag(
        MEASURED, list(MEASURES), f"some of {', '.join(MEASURES)}, or none for only time and memory (default: all)",
        type=some_of(MEASURES, "measure"), metavar="A,B",
    )  # fmt: skip
    retention: list[str] = flag(
        MEASURED, [], "rows that should not get worse: multiple choice, questions and answers, or texts; may be "
        "repeated", nargs="+", action="extend", metavar="[NAME=]DATA",
    )  # fmt: skip
    retention_limit: int | None = flag(
        MEASURED, None, "only the first N items of each such set, also built-in ones", type=at_least_one
    )
    match_rows: int = flag(
        MEASURED, 100, "test rows that models answer in full, if answers end in '#### n'", type=not_negative
    )
    robust_rows: int = flag(MEASURED, 32, "test rows to ask in other wordings and with noise", type=not_negative)
    max_new_tokens: int = flag(MEASURED, 256, "most tokens in an answer", type=at_least_one)
    watch_forgetting: float = flag(
        MEASURED, 0.0, "also measure forgetting during training, in this share of the training time, such as 0.1; the "
        "report then has the curve (default: 0, only afterwards)", type=share_of,
    )  # fmt: skip
    save_steps: int | None = flag(
        HOW, None, "save a checkpoint every N steps, from which a killed training resumes (default: it starts again)",
        type=at_least_one,
    )  # fmt: skip
    keep_models: bool = flag(
        HOW, False, "keep every trained model, as model/ in its run's folder", type=yes_or_no, nargs="?", const=True
    )

    @property
    def modes(self) -> tuple[str, ...]:
        """What runs are compared at: equal `steps`, equal `time`, or both."""
        return ("steps", "time") if self.equal == "both" else (self.equal,)

    @property
    def kept_files(self) -> list[tuple[str, str]]:
        """(name, file) of each of --retention."""
        parts = [value.partition("=") if "=" in value else (Path(value).stem, "=", value) for value in self.retention]
        return [(name, file) for name, _, file in parts]
