"""What is forgotten while `lfu train` runs: its flags, the callback they make, and its curve in the terminal."""

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from lfu import ForgettingCallback
from lfu.forgetting.schedule import check_best
from lfu.support.errors import UserError, one_line
from lfu.support.flags import option

MOST_ROWS = 20  # of the curve, in a terminal
BAR = 20  # columns


@dataclass
class ForgettingArguments:
    """What to measure while the model trains. Any of these flags switches it on."""

    _argument_group_name = "forgetting"

    forgetting: bool = option(False, "Measure what is forgotten while training.")
    forgetting_budget: str | None = option(
        None, "How much may be forgotten: 0.02 is 2 %% of the known questions and 0.02 nats (the unit of the loss) per "
        "token on prose; or questions=0.02,prose=0.05.",
    )  # fmt: skip
    forgetting_stop: bool = option(False, "End the run when the budget is exceeded beyond the noise.")
    forgetting_keep_best: bool = option(
        False, "Keep the best checkpoint within the budget as the result (with --load_best_model_at_end true)."
    )
    forgetting_every: int | None = option(None, "Measure every N steps. Default: at each evaluation, or ten times.")
    forgetting_share: float = option(0.05, "Largest share of the time for measuring; fewer items are asked to keep it.")
    forgetting_files: list[str] | None = option(
        None, "Also measure your files: rows with question, choices and answer, or with text; or paragraphs in a .txt."
    )

    def callback(self, say: Callable[[str], None], args: Any, given: Collection[str]) -> ForgettingCallback | None:
        """The callback for a trainer with these `args`, if the flags ask for it; `given`: the names of those given."""
        asked = sorted(name for name in given if name.startswith("forgetting_"))
        if asked and "forgetting" in given and not self.forgetting:
            raise UserError(f"--forgetting false measures nothing, and --{asked[0]} says how: drop one of them")
        if not asked and not self.forgetting:
            return None
        try:
            if self.forgetting_keep_best:
                check_best(args)
            named = {name: getattr(self, f"forgetting_{name}") for name in ("budget", "stop", "keep_best", "every")}
            share, files = self.forgetting_share, self.forgetting_files or ()
            return ForgettingCallback(**named, share_of_time=share, files=files, say=say)
        except ValueError as error:
            raise UserError(_in_flags(one_line(error))) from error


def _in_flags(text: str) -> str:
    """A message about the callback's and the trainer's arguments, in the words of the command line."""
    text = text.replace("share_of_time", "share").replace(", or None", "")
    text = re.sub(r"\b(stop|keep_best|every|share|budget)(?==| must)", r"--forgetting_\1", text)
    return re.sub(
        r"(--\w+|load_best_model_at_end)=(True|[\d.]+)", lambda m: f"--{m[1].lstrip('-')} {m[2].lower()}", text
    )


def curve(callback: ForgettingCallback) -> None:
    """Prints the readings as a table of 80 columns, with bars for what is forgotten of the known questions."""
    readings = callback.memory.readings if callback.memory else []
    if not readings:
        return
    console = Console()
    console = Console(width=min(80, console.width) if console.is_terminal else 80, highlight=False)
    table = Table(title="Forgetting", title_justify="left", box=None, pad_edge=False)
    columns = ["step", "lost", "gained", "net lost", "prose, nats", "KL, nats", "prose: rise"]
    for name in columns:
        table.add_column(name, justify="left" if name == columns[-1] else "right", no_wrap=True)
    rises = filter(math.isfinite, (abs(r.figures["prose_rise"]) for r in readings))  # a broken model's is NaN
    most = max(*rises, callback.budget.get("prose", 0.0), 1e-9)
    every = -(-len(readings) // MOST_ROWS)
    for reading in readings[::-every][::-1]:  # the last one is always there
        of = reading.figures
        shown = [str(reading.step), f"{of['lost']}", f"{of['gained']}", f"{of['net_lost']:+.1%}"]
        shown += [f"{of['prose_rise']:+.3f}", f"{of['kl']:.4f}" if "kl" in of else ""]
        table.add_row(*shown, _bar(reading, most, callback.budget.get("prose")))
    console.print(table)
    known, items = (readings[-1].figures[name] for name in ("known", "items"))
    console.print(f"Of {items} questions the untouched model knew {known}. Net lost: (lost - gained) / known.")


def _bar(reading: Any, most: float, limit: float | None) -> str:
    """A bar as long as the rise of the loss on prose, with a mark at its budget."""
    cells = ["█"] * round(BAR * max(0.0, reading.figures["prose_rise"]) / most)
    cells += [" "] * (BAR + 1 - len(cells))
    if limit is not None:
        cells[round(BAR * limit / most)] = "|"
    return "".join(cells).rstrip() + (" over" if "prose" in reading.over else "")
