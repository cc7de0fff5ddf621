"""A run on disk: a folder of small whole files, each written as soon as a phase is over, and a lock while it is held.

config.json    what it is, written first
begun.json     who works on it; it goes when that is over, and stays if the process dies
log.jsonl      one line a training step, as training goes
trained.json   training is over, and the weights are in model/
part-*.json    one measurement each
record.json    everything; begun.json, trained.json and part-*.json then go
failed.json    what went wrong, when, and in which session
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lfu.study.metrics import kept_losses
from lfu.study.plan import Run
from lfu.support.errors import one_line
from lfu.support.files import dump_json, write_text

MODEL, TRAINER = "model", "trainer"
# Level of a run -> the parts that are measured then.
PARTS = {"search": ("validation",), "rung": ("validation", "kept")}


class Place:
    """The folder of one run, with its key: files of another key are not read.

    `session`: who works here. A failure of before `since` (seconds since the epoch) is tried again.
    """

    def __init__(self, path: Path, key: str, session: str, since: float = 0.0):
        self.path, self.key, self.session, self.since = path, key, session, since
        self.log, self.model = path / "log.jsonl", path / MODEL
        self._known: dict[str, Any] = {}

    @property
    def failed(self) -> bool:
        return self.failure is not None

    @property
    def diverged(self) -> bool:
        return bool(self.failure and self.failure["diverged"])

    def finished(self, level: str) -> bool:
        if self.record is not None:
            return True
        if level == "timing":
            return self.trained is not None
        return level in PARTS and all(self.part(name) is not None for name in PARTS[level])

    @property
    def validation(self) -> float | None:
        scores = self._scores("validation")
        return sum(scores["nll"]) / sum(scores["tokens"]) if scores else None

    @property
    def kept(self) -> dict[str, float] | None:
        scores = self._scores("kept")
        return kept_losses(scores) if scores else None

    @property
    def step_seconds(self) -> float | None:
        return self.cost.get("step_seconds")

    @property
    def record(self) -> dict[str, Any] | None:
        return self._read("record")

    @property
    def trained(self) -> dict[str, Any] | None:
        return self._read("trained")

    @property
    def cost(self) -> dict[str, Any]:
        """What training took, once it is over."""
        return (self.record or self.trained or {}).get("cost", {})

    @property
    def failure(self) -> dict[str, Any] | None:
        """A failure of this session, or of one beside it since this one began; older ones are tried again.

        But for numbers that were not finite: the same run comes to them again.
        """
        found = self.any_failure
        if found is None or found["diverged"] or found["session"] == self.session:
            return found
        return found if found["time"] >= self.since else None

    @property
    def any_failure(self) -> dict[str, Any] | None:
        return None if self.record else self._read("failed", remember=False)  # it may be tried again elsewhere

    def part(self, name: str) -> Any:
        kept = self._read(f"part-{name}")
        return kept["result"] if kept else None

    def _scores(self, name: str) -> Any:
        return self.record["measures"].get(name) if self.record else self.part(name)

    def keep(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a file of the run, by its name without `.json`."""
        write_text(self.path / f"{name}.json", dump_json({"key": self.key, **value}))
        self._known.pop(name, None)

    def forget(self, name: str) -> None:
        """Removes such a file."""
        (self.path / f"{name}.json").unlink(missing_ok=True)
        self._known.pop(name, None)

    def begin(self, config: Mapping[str, Any]) -> None:
        """Says what the run is; an older failure is forgotten."""
        self.keep("config", config)
        self.forget("failed")

    def finish(self, record: Mapping[str, Any], *, keep_model: bool) -> None:
        """The record takes the place of what led to it."""
        self.keep("record", record)
        for name in [*(file.stem for file in self.path.glob("part-*.json")), "trained", "failed"]:
            self.forget(name)
        self.drop(TRAINER)
        if not keep_model:
            self.drop(MODEL)

    def fail(self, error: BaseException, phase: str, trace: str, *, diverged: bool = False) -> None:
        """Keeps what went wrong; a failed training leaves no half of itself."""
        kind, message = type(error).__name__, one_line(error)
        told = message if kind in ("UserError", "Diverged", "Died") else f"{kind}: {message}"
        self.keep("failed", {
            "session": self.session, "time": time.time(), "phase": phase, "diverged": diverged, "error": told,
            "traceback": trace,
        })  # fmt: skip
        self.drop(TRAINER)

    def drop(self, folder: str) -> None:
        """Removes the checkpoints, or the weights of a run that is not wanted any further."""
        shutil.rmtree(self.path / folder, ignore_errors=True)

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Yields whether the run is ours now; held by another process, it isn't. A dead process holds nothing."""
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(FileLock(self.path / "run.lock", blocking=False))
                ours = True
            except Timeout:
                ours = False
            yield ours

    def marked(self) -> dict[str, Any] | None:
        """The mark of a worker that began the run and neither finished nor failed it."""
        return self._read("begun", remember=False)

    def mark(self) -> None:
        self.keep("begun", {"session": self.session, "process": os.getpid()})

    def unmark(self) -> None:
        self.forget("begun")

    def _read(self, name: str, *, remember: bool = True) -> Any:
        """The file's content if it belongs to this run; a file that is once there doesn't change."""
        if name in self._known:
            return self._known[name]
        try:
            found = json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))
            if found.get("key") != self.key:
                return None
        except (OSError, ValueError, AttributeError):
            return None
        if remember:
            self._known[name] = found
        return found


def path_of(folder: Path, run: Run, key: str) -> Path:
    """Where in a study's folder a run of this key lies, or is to lie."""
    name = "-".join([slug(run.label), f"seed{run.seed}", key[:8]] if run.setting else [run.label, key[:8]])
    path = folder / "runs" / name
    there = [] if path.is_dir() else sorted(path.parent.glob(f"*-{key[:8]}"))  # done under another label
    return there[0] if there else path


def slug(label: str) -> str:
    """A label as part of a file name."""
    return re.sub(r"[^\w.+-]+", "_", label)[:60].strip("_.")
