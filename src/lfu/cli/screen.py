"""What `lfu train` shows: five lines before the first step, then one line per logging step, with the time left.

The libraries' own bars, notes and metric dictionaries are folded away; every figure still goes to the trackers and to
`metrics.jsonl` in the output folder. `--verbose true` brings the libraries' output back.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from lfu.support.errors import leading, one_line
from lfu.support.quiet import quiet_libraries
from lfu.support.words import duration
from lfu.training.advice import LfUAdvice

METRICS_FILE = "metrics.jsonl"
COLUMNS = (  # heading, the logged names it shows (the first that is there), format
    ("loss", ("lfu/sft_loss", "loss"), "{:.3f}"),
    ("held-out", ("eval_loss",), "{:.3f}"),
    ("forgotten", ("forgetting/net_lost",), "{:+.1%}"),
    ("rate", ("learning_rate",), "{:.1e}"),
)


@contextmanager
def folded(verbose: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, the libraries are quiet and this package's own advice is one line each; unchanged with `verbose`."""
    if verbose:
        yield
        return
    with quiet_libraries():
        warnings.filterwarnings("always", category=LfUAdvice)
        warnings.showwarning = lambda message, *more, **named: say(f"note: {one_line(message)}")
        yield  # quiet_libraries restores showwarning: it is one of the things that catch_warnings keeps


class Screen(TrainerCallback):
    """One line per logging step: step, loss, held-out loss, forgotten, learning rate, time left.

    Args:
        trainer: the trainer; its own progress bar and printer are taken off.
        folder: where `metrics.jsonl` goes; a run that is resumed appends to it.
        often: log some twenty times, where the run is too short for the usual every tenth step.
    """

    def __init__(self, trainer: Any, folder: Path, *, often: bool):
        self.folder, self.often = folder, often
        self.shown: dict[str, float] = {}
        self.awaited = {"eval_loss"} if trainer.eval_dataset is not None else set()
        self.started, self.first_step = 0.0, 0
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step
        if self.often:
            state.logging_steps = max(1, min(state.logging_steps, state.max_steps // 20))

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **more: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
        self._keep(numbers, state)
        self.shown |= {name: float(value) for name, value in numbers.items()}
        if "loss" in numbers:
            print(self.line(state.global_step, state.max_steps), flush=True)

    def line(self, step: int, steps: int) -> str:
        """The line of one logging step; 80 columns hold it."""
        parts = [f"step {step:>{len(str(steps))}}/{steps}"]
        for heading, names, form in COLUMNS:
            value = next((self.shown[name] for name in names if name in self.shown), None)
            if value is not None or names[0] in self.awaited:
                parts.append(f"{heading} {'-':<5}" if value is None else f"{heading} {form.format(value)}")
        if step > self.first_step and step < steps:
            left = (time.monotonic() - self.started) / (step - self.first_step) * (steps - step)
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def _keep(self, numbers: Mapping[str, float], state: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **numbers}) + "\n")


# -- the five lines ----------------------------------------------------------------------------------------------------


def show(facts: Mapping[str, str]) -> None:
    """Prints the facts, one per line, on the first process."""
    if leading():
        for name, text in facts.items():
            print(f"{name:<9}{text}")
        sys.stdout.flush()


def facts(trainer: Any, data: str, eval_rows: Any) -> dict[str, str]:
    """What a run is about, before its first step: rows, tokens, trained parameters, method, memory and time expected.

    Args:
        trainer: ready to train.
        data: where the rows come from.
        eval_rows: the rows to evaluate on; None for none.
    """
    from lfu.cli.estimate import expected, parameters, tokens_of

    args = trainer.args
    total, learned, longest, exact = tokens_of(trainer)
    trained, everything = parameters(trainer.model)
    memory, seconds = expected(trainer, total)
    about = "" if exact else "about "
    held_out = f"{len(eval_rows):,} held out" if eval_rows is not None else "none held out (--eval_data FILE)"
    theta = f"an adapter of {trained:,}" if hasattr(trainer.model, "peft_config") else f"{trained:,}"
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    length = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    return {
        "Rows": f"{len(trainer.train_dataset):,} to train on from {data}, {held_out}",
        "Tokens": f"{about}{total:,} per epoch, {learned / max(total, 1):.0%} of them learned; longest row {longest:,}",
        "Trains": f"{theta} of {everything:,} parameters, {length}, {batch} rows per step",
        "Method": f"{args.method} at learning rate {args.learning_rate:g} (--method, --learning_rate)",
        "Needs": f"roughly {memory / 2**30:.1f} GiB of memory and {duration(seconds)}",
    }
