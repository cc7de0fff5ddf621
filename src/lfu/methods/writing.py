"""The model writes, before it is trained: where it does, what ends an answer, and where the texts are kept."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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


class Rewrite(NamedTuple):
    """What the model wrote, and whether it ended by itself."""

    text: str
    ended: bool


class Rewrites:
    """The rewrites of one model, key -> `Rewrite`: a JSON line each, added as they come, so that a kill loses no more
    than one batch. Read when made."""

    def __init__(self, path: Path):
        self.path, self.found = path, dict(_read(path))

    def add(self, new: Mapping[str, Rewrite]) -> None:
        """Appends and flushes."""
        self.found |= new
        lines = [json.dumps({"key": k, "ended": r.ended, "text": r.text}) + "\n" for k, r in new.items()]
        # a line that a kill cut off has no end: the next one must not be glued to it
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with self.path.open("a", encoding="ascii") as file:
            file.write("".join(["" if whole else "\n", *lines]))


def _read(path: Path) -> Iterator[tuple[str, Rewrite]]:
    """The whole lines of the file; anything else, such as a line that a kill cut off, is passed over."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            yield str(entry["key"]), Rewrite(str(entry["text"]), bool(entry["ended"]))
        except (ValueError, TypeError, KeyError):
            continue
