"""Results of finished tasks, kept by what decides them: weights, task and items, settings, library versions.

One JSON file a result, in the folder `evaluations` of the user's cache (see `lfu.model.embedded.cache_folder`).
"""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfu.evaluation.record import digest, versions
from lfu.support.errors import UserError
from lfu.support.files import dump_json, write_text

FORMAT = 2  # raise it when what is kept changes: older results are then not found
PACKAGES = ("lm_eval", "torch", "transformers", "peft")


def folder() -> Path:
    """Where results are kept."""
    from lfu.model.embedded import cache_folder

    return cache_folder() / "evaluations"


def key(model: str, task: str, settings: Mapping[str, Any]) -> str:
    """The name of a result: a hash of everything that decides it, by `model_fingerprint` and `task_fingerprint`."""
    known = versions(PACKAGES)
    return digest([FORMAT, model, task, dict(settings), {name: known.get(name) for name in PACKAGES}], _plain)


def load(name: str, place: Path | None = None) -> dict[str, Any] | None:
    """The result of that key, or None: none was kept, or its file can't be read."""
    try:
        kept = json.loads(((place or folder()) / f"{name}.json").read_text(encoding="utf-8"))
        return kept["result"] if kept["key"] == name else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(name: str, result: Mapping[str, Any], place: Path | None = None) -> None:
    """Keeps a result. Raises UserError: the folder can't be written."""
    place = place or folder()
    try:
        write_text(place / f"{name}.json", dump_json({"key": name, "result": dict(result)}))
    except OSError as error:
        raise UserError(
            f"cache folder {place} can't be written ({error.strerror}): point LFU_CACHE to another, or use --no_cache"
        ) from error


def model_fingerprint(weights: str, model: Any, tokenizer: Any) -> str:
    """Hash of what the model computes: weights (their hash), configuration, adapter settings, tokenizer.

    The weights alone don't tell: LoRA's scaling and the base of the rotary positions are in no tensor.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapters = {name: config.to_dict() for name, config in (getattr(model, "peft_config", None) or {}).items()}
    active = getattr(model, "active_adapters", None) if adapters else None
    configs = [_settings(part) for part in (base.config, getattr(base, "generation_config", None)) if part is not None]
    device = str(next(model.parameters()).device.type)
    return digest([weights, type(base).__name__, configs, adapters, active, device, _tokenizer(tokenizer)], _plain)


def task_fingerprint(tasks: list[Any], *, limit: int | None, num_fewshot: int) -> str:
    """Hash of the harness's definitions and of the rows that are read: items up to the limit, and examples."""
    parts = []
    for task in tasks:
        settings = {k: v for k, v in task.config.to_dict(keep_callable=True).items() if k not in _LEFT_OUT}
        rows = list(task.eval_docs if limit is None else task.eval_docs.select(range(min(limit, len(task.eval_docs)))))
        examples = list(task.fewshot_docs() or []) if num_fewshot else []
        parts.append([_source(type(task)), settings, rows, examples])
    return digest([parts, num_fewshot], _plain)


# Where rows come from: the rows themselves are hashed. And what the harness sets when it runs a task.
_LEFT_OUT = ("dataset_kwargs", "custom_dataset", "metadata", "num_fewshot")


def _settings(config: Any) -> dict[str, Any]:
    """A transformers config without the name of the place it was loaded from."""
    return {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}


def _tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = [str(tokenizer.bos_token), str(tokenizer.eos_token), str(tokenizer.pad_token)]
    more = [getattr(tokenizer, name, None) for name in ("chat_template", "add_bos_token", "model_max_length")]
    return digest([body, special, more], _plain)


def _plain(value: Any) -> Any:
    """What JSON doesn't know, in a form that is the same in every process."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if callable(value):
        return _source(value)
    return str(value)


def _source(function: Any) -> str:
    """A function or class as text: its code where it can be had, else its name."""
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    try:
        return f"{name}\n{inspect.getsource(function)}"
    except (OSError, TypeError):
        return name
