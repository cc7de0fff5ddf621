"""The trainer that calls a callback. transformers doesn't pass it on, and trackers can't be reached without it."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback


def _callers(name: str) -> Iterator[Any]:
    """What the local variable `name` holds in each function that is running, the innermost first."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame.f_locals.get(name)
        frame = frame.f_back


def handler_of(callback: Any) -> CallbackHandler | None:
    """The handler that is calling `callback` now, found among the callers; None where somebody else calls it."""
    handlers = (one for one in _callers("self") if isinstance(one, CallbackHandler))
    return next((handler for handler in handlers if callback in handler.callbacks), None)


def resumed_from(state: Any, args: Any) -> list[Path]:
    """Folders that the run may have been resumed from: as `train` was told, then by the step, then the run's own."""
    folders = [Path(told) for told in _callers("resume_from_checkpoint") if isinstance(told, str)]
    return [*folders, Path(args.output_dir) / f"checkpoint-{state.global_step}", Path(args.output_dir) / "forgetting"]


def log(callback: Any, figures: Mapping[str, float], args: Any, state: Any, control: Any) -> None:
    """Puts figures into the trainer's history and every tracker, and touches nothing else.

    Not by `Trainer.log`: TRL's adds and clears its own running means there, which would change what the run logs.
    """
    entry = dict(figures) | ({} if state.epoch is None else {"epoch": state.epoch})
    state.log_history.append(entry | {"step": state.global_step})
    handler = handler_of(callback)
    if handler is None:
        return
    trackers = [each for each in handler.callbacks if not isinstance(each, PrinterCallback | ProgressCallback)]
    flags = dict(vars(control))
    with mock.patch.object(handler, "callbacks", trackers):
        handler.on_log(args, state, control, dict(entry))
    vars(control).update(flags)
