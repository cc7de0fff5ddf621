"""What `lfu train` shows: five lines before the first step, then one line per logging step, with the time left.

The libraries' own bars, notes and metric dictionaries are folded away; every figure still goes to the trackers and to
`metrics.jsonl` in the output folder. `--verbose true` brings the libraries' output back.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from lfu.cli.estimate import expected, parameters, tokens_of
from lfu.support.errors import one_line
from lfu.support.quiet import quiet_libraries
from lfu.support.words import counted, duration, filled
from lfu.training.advice import DOMINATING, NEGLIGIBLE, LfUAdvice

METRICS_FILE = "metrics.jsonl"
COLUMNS = (  # heading, the logged names it shows (the first that is there), format
    ("loss", ("lfu/sft_loss", "loss"), "{:.3f}"),
    ("held-out", ("eval_loss",), "{:.3f}"),
    ("forgotten", ("forgetting/net_lost",), "{:+.1%}"),
    ("rate", ("learning_rate",), "{:.1e}"),
)


@contextmanager
def folded(verbose: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Silences the libraries and shows this package's advice in one line each; does nothing with `verbose`."""
    if verbose:
        yield
        return
    with quiet_libraries():
        warnings.filterwarnings("always", category=LfUAdvice)
        warnings.showwarning = lambda message, *more, **named: say(f"note: {one_line(message)}")
        yield  # quiet_libraries restores showwarning: it is one of the things that catch_warnings keeps


class Screen(TrainerCallback):
    """One line per logging step: step, loss, held-out loss, forgotten, learning rate, time left.

    `metrics.jsonl` goes to `folder`; a run that is resumed appends to it. `often`: some twenty lines, where the run is
    too short for the usual one every tenth step.
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
        self.started, self.first_step = 0.0, state.global_step
        if self.often:
            state.logging_steps = max(1, min(state.logging_steps, state.max_steps // 20))

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.started = self.started or time.monotonic()  # after what is measured once, before the first step

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **more: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **numbers}) + "\n")
        if state.global_step == 0 and "forgetting/net_lost" in numbers:  # the untouched model has forgotten nothing
            self.awaited.add("forgetting/net_lost")
            return
        self.shown |= {name: float(value) for name, value in numbers.items()}
        if "loss" in numbers:
            print(self.line(state.global_step, state.max_steps), flush=True)

    def line(self, step: int, steps: int) -> str:
        """The line of one logging step, without the learning rate where 80 columns don't hold all of it."""
        parts = [f"step {step:>{len(str(steps))}}/{steps}"]
        for heading, names, form in COLUMNS:
            value = next((self.shown[name] for name in names if name in self.shown), None)
            if value is not None or names[0] in self.awaited:
                parts.append(f"{heading} {'-':<5}" if value is None else f"{heading} {form.format(value)}")
        if self.first_step < step < steps:
            left = (time.monotonic() - self.started) / (step - self.first_step) * (steps - step)
            parts.append(f"{duration(left)} left")
        line = "  ".join(parts)
        return line if len(line) <= 80 else "  ".join(part for part in parts if not part.startswith("rate "))


def facts(trainer: Any, data: str) -> dict[str, str]:
    """What a run will do: rows (of `data`), tokens, parameters, method, memory and time."""
    args, eval_rows = trainer.args, trainer.eval_dataset
    total, learned, longest, exact = tokens_of(trainer)
    trained, everything = parameters(trainer.model)
    memory, seconds = expected(trainer, total)
    about = "" if exact else "about "
    held_out = f"{len(eval_rows):,} held out" if eval_rows is not None else "none held out (--eval_data FILE)"
    theta = f"an adapter of {trained:,}" if hasattr(trainer.model, "peft_config") else f"{trained:,}"
    epochs = f"{args.num_train_epochs:g} epoch{'s' * (args.num_train_epochs != 1)}"
    length = counted(args.max_steps, "step") if args.max_steps > 0 else epochs
    batch = counted(min(_batch(args), len(trainer.train_dataset)), "packed row" if args.packing else "row")
    return {
        "Rows": f"{len(trainer.train_dataset):,} to train on from {data}, {held_out}",
        "Tokens": f"{about}{total:,} per epoch, {learned / max(total, 1):.0%} of them learned; longest row {longest:,}",
        "Trains": f"{theta} of {everything:,} parameters, {length}, {batch} per step",
        "Method": f"{args.method} at learning rate {args.learning_rate:g} (--method, --learning_rate)",
        "Needs": f"roughly {memory / 2**30:.1f} GiB of memory and {duration(seconds)}",
    }


def summary(trainer: Any, folder: Path, seconds: float, done_before: int) -> str:
    """What was done in these `seconds` after the steps of earlier runs, what was logged last, and where it is saved."""
    state = trainer.state
    if done_before and state.global_step == 0:  # not one step was taken
        return f"Nothing left to train: the run was complete at step {done_before:,}. Saved in {folder}"
    logged = [entry for entry in state.log_history if entry["step"] > done_before]  # not by an earlier command
    last = {name: value for entry in logged for name, value in entry.items()}
    steps = f"steps {done_before + 1:,} to {state.global_step:,}" if done_before else counted(state.global_step, "step")
    tokens = counted(int(trainer._total_train_tokens), "token")  # TRL counts anew when a run is resumed
    lines = [f"Trained on {_rows_seen(trainer, done_before)}, {tokens}, {steps} in {duration(seconds)}."]
    names = ("train_loss", "lfu/sft_loss", "lfu/consistency", "lfu/gradient_ratio", "eval_loss")
    if losses := [f"{name.removeprefix('lfu/')} {float(last[name]):.4g}" for name in names if name in last]:
        lines.append(f"Last logged: {', '.join(losses)}.")
    ratio = last.get("lfu/gradient_ratio")
    if ratio is not None and trainer.args.lam != "auto" and not NEGLIGIBLE <= ratio <= DOMINATING:
        # a word on short runs, too, which end before the trainer's advice has seen enough micro-batches
        word = "hardly acts" if ratio < NEGLIGIBLE else "dominates"
        lines.append(f"Note: at a gradient ratio of {ratio:.2g} LfU {word}; --lam auto holds it at --strength (0.5).")
    lines.append(filled(f"Saved in {folder}{_kept(trainer)}", rest="  "))
    if (folder / "adapter_config.json").is_file():
        lines += ["Next, talk to it beside the untouched model, or merge it into a full model:"]
        lines += [f"  lfu chat {folder} --beside", f"  lfu export {folder} {folder}-merged"]
    return "\n".join(lines)


def _batch(args: Any) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def _rows_seen(trainer: Any, done_before: int) -> str:
    """`36 rows`, or `32 of 100,000 rows` where the steps of this command ended within an epoch."""
    rows, seen = len(trainer.train_dataset), (trainer.state.global_step - done_before) * _batch(trainer.args)
    all_of = counted(rows, "packed row" if trainer.args.packing else "row")
    return all_of if seen >= rows else f"{seen:,} of {all_of}"


def _kept(trainer: Any) -> str:
    """Which weights were saved, if they are not the last ones, and what the budget of forgetting cost."""
    state = trainer.state
    step = getattr(state, "best_global_step", None) if trainer.args.load_best_model_at_end else None
    if not step or step >= state.global_step:
        return ""
    best = f": the weights of step {step:,}, the best on the held-out rows"
    held_out = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
    budgeted = any(getattr(callback, "keep_best", False) for callback in trainer.callback_handler.callbacks)
    if not budgeted or step not in held_out or held_out[step] <= min(held_out.values()):
        return best
    lowest = min(held_out, key=lambda at: held_out[at])
    return (
        f"{best} (loss {held_out[step]:.3f}) of those measured and within the budget of forgetting; step {lowest:,} "
        f"had {held_out[lowest]:.3f}"
    )
