"""Which checkpoint of a run can be gone on from: the newest one that is complete and can be read."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lfu.support.errors import UserError, one_line
from lfu.support.files import restore

NAME = re.compile(r"checkpoint-(\d+)")
STATE = "trainer_state.json"  # Trainer writes it last
# What Trainer needs to go on exactly, beside the weights. FSDP and DeepSpeed keep theirs in folders of their own.
PICKLED = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
MAY_BE_THERE = re.compile(r"scaler\.pt|rng_state_\d+\.pth")  # of fp16; of several processes, in place of rng_state.pth
SHARDED = ("global_step", "optimizer_", "pytorch_model_fsdp", "fsdp_")
SHARDS = re.compile(r"(pytorch_model_fsdp|optimizer)_\d+")  # folders of FSDP


class CheckpointError(UserError, ValueError):
    """A checkpoint that can't be gone on from."""


def steps_of(checkpoint: Path | str) -> int:
    """The steps that a checkpoint has behind it, by its name; 0 for a folder of another name."""
    found = NAME.fullmatch(Path(checkpoint).name)
    return int(found[1]) if found else 0


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, sound or not, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=steps_of)


def newest(
    folder: Path, *, say: Callable[[str], None] = lambda line: None, save_only_model: bool = False
) -> Path | None:
    """The newest checkpoint in `folder` that training can go on from, or None.

    One that a killed run was replacing gets its name back first.

    Args:
        say: is told of every newer one that is passed over, and why.
        save_only_model: such checkpoints have no optimizer, and need none.
    """
    restore(folder)
    for path in reversed(checkpoints(folder)):
        why = fault(path, save_only_model=save_only_model)
        if why is None:
            return path
        say(f"checkpoint {path} is passed over: {why}")
    return None


def fault(checkpoint: Path, *, save_only_model: bool = False) -> str | None:
    """Why training can't go on from a checkpoint, in a few words; None if it can. No weight is read, only headers.

    Args:
        save_only_model: it was saved so: without optimizer, schedule and random state.
    """
    try:
        names = {path.name for path in checkpoint.iterdir()}
        if STATE not in names:
            return f"it has no {STATE}, so it was never finished"
        state = _json(checkpoint / STATE)
        if not (isinstance(state, dict) and isinstance(state.get("global_step"), int)):
            return f"{STATE} holds no state of a training"
        if not isinstance(state.get("epoch"), int | float | None):
            return f"{STATE} holds no state of a training"
        for path in sorted(checkpoint.glob("*.json")):
            _json(path)
        if any(name.startswith(SHARDED) for name in names):
            return _shards_fault(checkpoint, names, save_only_model)
        return _weights_fault(checkpoint, names) or (None if save_only_model else _pickled_fault(checkpoint, names))
    except _Unreadable as error:
        return str(error)
    except OSError as error:
        return f"it can't be read ({error.strerror or one_line(error)})"


class _Unreadable(Exception):
    """Says which file, and why."""


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _Unreadable(f"{path.name} is damaged ({one_line(error)})") from error
    except OSError as error:
        raise _Unreadable(f"{path.name} can't be read ({error.strerror})") from error


def _weights_fault(checkpoint: Path, names: set[str]) -> str | None:
    from safetensors import SafetensorError, safe_open

    wanted = {name for name in names if name.endswith(".safetensors")}
    for index in sorted(name for name in names if name.endswith(".safetensors.index.json")):
        content = _json(checkpoint / index)
        files = content.get("weight_map") if isinstance(content, dict) else None
        if not (isinstance(files, dict) and all(isinstance(name, str) for name in files.values())):
            raise _Unreadable(f"{index} is damaged (it has no weight_map)")
        wanted |= set(files.values())
    if not any(name.startswith(("model", "adapter_model")) for name in wanted):
        inside = list(checkpoint.glob("*/adapter_model.safetensors"))  # several adapters: a folder each
        wanted |= {str(path.relative_to(checkpoint)) for path in inside}
        if not inside:
            return "it has no weights (model.safetensors or adapter_model.safetensors)"
    for name in sorted(wanted):
        try:
            with safe_open(checkpoint / name, framework="pt"):
                pass  # the header, and whether the file is as long as it says
        except (SafetensorError, OSError) as error:
            raise _Unreadable(f"{name} is damaged or can't be read ({one_line(error)})") from error
    return None


def _shards_fault(checkpoint: Path, names: set[str], save_only_model: bool) -> str | None:
    """Of FSDP and DeepSpeed: whether every part is there. What is in the shards their own loaders alone can tell."""
    for name in sorted(name for name in names if SHARDS.fullmatch(name)):
        if not (checkpoint / name / ".metadata").is_file():
            return f"{name} has no .metadata, so it was never finished"
        if any(path.stat().st_size == 0 for path in (checkpoint / name).glob("*.distcp")):
            raise _Unreadable(f"{name} is damaged (an empty file)")
    of_fsdp = any(name.startswith("pytorch_model_fsdp") for name in names)
    if of_fsdp and not save_only_model and not any(name.startswith("optimizer") for name in names):
        return "it has no optimizer, without which training would not go on as it was"
    if "latest" in names:  # DeepSpeed's word for which of its folders counts
        tag = (checkpoint / "latest").read_text(encoding="utf-8", errors="replace").strip()
        if not tag or not (checkpoint / tag).is_dir():
            return f"latest names {tag or 'nothing'}, which is not there"
    _check_pickles(checkpoint, sorted(name for name in names if name == "scheduler.pt" or MAY_BE_THERE.fullmatch(name)))
    return None


def _pickled_fault(checkpoint: Path, names: set[str]) -> str | None:
    """Whether optimizer, schedule and random state are there and hold nothing but data."""
    for name in PICKLED:
        several = name == "rng_state.pth" and any(other.startswith("rng_state_") for other in names)
        if name not in names and not several:
            return f"it has no {name}, without which training would not go on as it was"
    _check_pickles(checkpoint, sorted(name for name in names if name in PICKLED or MAY_BE_THERE.fullmatch(name)))
    return None


def _check_pickles(checkpoint: Path, names: list[str]) -> None:
    import torch
    from transformers.trainer_pt_utils import safe_globals

    for name in names:
        try:
            with safe_globals(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.load(checkpoint / name, map_location="cpu", weights_only=True, mmap=name == "optimizer.pt")
        except Exception as error:  # a damaged pickle can raise anything
            reason = "holds more than data" if "weights_only" in str(error).lower() else type(error).__name__
            raise _Unreadable(f"{name} is damaged or can't be read ({reason})") from error
