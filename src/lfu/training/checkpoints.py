"""Which checkpoint of a run can be gone on from: the newest one that is complete and can be read."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lfu.support.errors import UserError, one_line
from lfu.support.files import restore

NAME = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "lfu_state.safetensors"  # of the methods
RUN_FILE = "lfu_run.json"  # which run the checkpoint is of
STATE = "trainer_state.json"  # Trainer writes it last
# What Trainer needs to go on exactly, beside the weights. FSDP and DeepSpeed keep theirs in folders of their own.
PICKLED = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
SCALER_AND_PARTS = re.compile(r"scaler\.pt|rng_state_\d+\.pth")  # of fp16; of several processes, for rng_state.pth
SHARDED = ("global_step", "optimizer_", "pytorch_model_fsdp", "fsdp_")
SHARDS = re.compile(r"(pytorch_model_fsdp|optimizer)_\d+")  # folders of FSDP
EXACTLY = "without which training would not go on as it was"


class CheckpointError(UserError, ValueError):
    """A checkpoint that can't be gone on from."""


def steps_of(checkpoint: Path | str) -> int:
    """The steps that a checkpoint has behind it, by its name; 0 for a folder of another name."""
    found = NAME.fullmatch(Path(checkpoint).name)
    return int(found[1]) if found else 0


def state_of(checkpoint: Path | str) -> dict[str, Any]:
    """What Trainer says of where a checkpoint is: `global_step`, `epoch`, ..."""
    return json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))


def is_complete(checkpoint: Path | str, args: Any) -> bool:
    """Whether a run with these training arguments ends at or before the checkpoint."""
    state = state_of(checkpoint)
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return (state.get("epoch") or 0) >= args.num_train_epochs


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, sound or not, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=steps_of)


def newest(
    folder: Path, *, say: Callable[[str], None] = lambda line: None, save_only_model: bool = False
) -> Path | None:
    """The newest checkpoint in `folder` that training can go on from; None where there is none.

    One that a killed run was replacing gets its name back first. `say` is told of every newer one that is passed over,
    and why. With `save_only_model` they have no optimizer, and need none.
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

    `save_only_model`: it was saved so: without optimizer, schedule and random state.
    """
    try:
        names = {path.name for path in checkpoint.iterdir()}
        if STATE not in names:
            return f"it has no {STATE}, so it was never finished"
        state = _read(checkpoint / STATE)
        whole = isinstance(state, dict) and isinstance(state.get("global_step"), int)
        if not whole or not isinstance(state.get("epoch"), int | float | None):
            return f"{STATE} holds no state of a training"
        sharded = any(name.startswith(SHARDED) for name in names)
        needed = ("scheduler.pt",) if sharded else PICKLED
        pickles = {name for name in names if name in needed or SCALER_AND_PARTS.fullmatch(name)}
        lacking = (_lacking_shards if sharded else _lacking)(checkpoint, names, save_only_model)
        data = {path.name for pattern in ("*.json", "*.safetensors") for path in checkpoint.glob(pattern)}
        for name in sorted(data) + ([] if save_only_model else sorted(pickles)):
            _read(checkpoint / name)
        return lacking
    except _Unreadable as error:
        return str(error)
    except OSError as error:
        return f"it can't be read ({error.strerror or one_line(error)})"


def _lacking(checkpoint: Path, names: set[str], save_only_model: bool) -> str | None:
    """What is not there of weights, optimizer, schedule and random state; those in parts are looked at."""
    parts: set[str] = set()
    for index in sorted(name for name in names if name.endswith(".safetensors.index.json")):
        content = _read(checkpoint / index)
        files = content.get("weight_map") if isinstance(content, dict) else None
        if not (isinstance(files, dict) and all(isinstance(name, str) for name in files.values())):
            raise _Unreadable(f"{index} is damaged (it has no weight_map)")
        parts |= set(files.values())
    parts |= {str(path.relative_to(checkpoint)) for path in checkpoint.glob("*/adapter_model.safetensors")}
    for part in sorted(parts):  # of several adapters each has a folder
        _read(checkpoint / part)
    if not any(Path(name).name.startswith(("model", "adapter_model")) and name.endswith(".safetensors")
               for name in names | parts):  # fmt: skip
        return "it has no weights (model.safetensors or adapter_model.safetensors)"
    for name in () if save_only_model else PICKLED:
        several = name == "rng_state.pth" and any(other.startswith("rng_state_") for other in names)
        if name not in names and not several:
            return f"it has no {name}, {EXACTLY}"
    return None


def _lacking_shards(checkpoint: Path, names: set[str], save_only_model: bool) -> str | None:
    """Of FSDP and DeepSpeed: which part is not there. What is in the shards their own loaders alone can tell."""
    for name in sorted(name for name in names if SHARDS.fullmatch(name)):
        if not (checkpoint / name / ".metadata").is_file():
            return f"{name} has no .metadata, so it was never finished"
        if any(path.stat().st_size == 0 for path in (checkpoint / name).glob("*.distcp")):
            raise _Unreadable(f"{name} is damaged (an empty file)")
    of_fsdp = any(name.startswith("pytorch_model_fsdp") for name in names)
    if of_fsdp and not save_only_model and not any(name.startswith("optimizer") for name in names):
        return f"it has no optimizer, {EXACTLY}"
    if "latest" in names:  # DeepSpeed's word for which of its folders counts
        tag = (checkpoint / "latest").read_text(encoding="utf-8", errors="replace").strip()
        if not tag or not (checkpoint / tag).is_dir():
            return f"latest names {tag or 'nothing'}, which is not there"
    return None


class _Unreadable(Exception):
    """Says which file, and why."""


def _read(path: Path) -> Any:
    """What is in a JSON file; of safetensors the header is read, and of pickles whether they hold nothing but data."""
    import torch
    from safetensors import safe_open
    from transformers.trainer_pt_utils import safe_globals

    try:
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return None  # the file is as long as its header says
        with safe_globals(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=path.name == "optimizer.pt")
    except Exception as error:  # a damaged pickle can raise anything
        why = type(error).__name__ if path.suffix in (".pt", ".pth") else one_line(error)
        why = "holds more than data" if "weights_only" in str(error).lower() else why
        raise _Unreadable(f"{path.name} is damaged or can't be read ({why})") from error
