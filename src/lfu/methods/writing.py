"""The model writes, before it is trained: where it does, what ends an answer, and where the texts are kept."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lfu.evaluation import batching
from lfu.methods.method import Method
from lfu.methods.run import Preparation
from lfu.model.embedded import cache_folder
from lfu.support.errors import UserError, one_line


@contextmanager
def ready_to_write(run: Preparation) -> Iterator[None]:
    """Within it the model is in eval mode and on the device that training will use: before it is mostly on the CPU."""
    model, device = run.model, run.args.device
    home = next(model.parameters()).device
    moves = home.type == "cpu" and device.type != "cpu" and not getattr(model, "hf_device_map", None)
    if moves:
        model.to(device)
    try:
        with batching.evaluating(model), torch.no_grad():
            yield
    finally:
        if moves:
            model.to(home)


def end_tokens(run: Preparation) -> list[int]:
    """The tokens that end an answer, the one that `args.eos_token` will set among them."""
    ends = set(batching.end_tokens(run.model, run.text_tokenizer))
    if run.args.eos_token:
        ends.add(run.text_tokenizer.convert_tokens_to_ids(run.args.eos_token))
    return sorted(ends)


def length_of(tokens: list[int], ends: list[int]) -> int:
    """How many tokens come before the first one that ends the answer."""
    return next((place for place, token in enumerate(tokens) if token in ends), len(tokens))


def key_of(*what: Any) -> str:
    """A key for all that decides a text: JSON-ready values."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


@contextmanager
def kept(method: Method, home: str, name: str, say: Callable[[str], None]) -> Iterator[Path]:
    """The folder in which `method` keeps the texts `name`, locked: a second process waits, and finds what was made.

    It is `home` in lfu's cache, unless the method has a knob `cache` that names another. Raises UserError: it can't be
    used.
    """
    given = getattr(method, "cache", None)
    folder = Path(given).expanduser() if given else cache_folder() / home
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            say(f"{method.name}: waiting for another process that writes with this model ({lock.lock_file})")
            held = lock.acquire()
        with held:
            yield folder
    except OSError as error:
        elsewhere = "LFU_CACHE=FOLDER in the environment"
        if given is not None:
            elsewhere = f"--method_args {method.name}.cache=FOLDER"
        raise UserError(
            f"{method.name} can't keep its texts in {folder} ({one_line(error)}): name a folder that can be written "
            f"to, {elsewhere}"
        ) from error
