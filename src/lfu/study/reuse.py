"""A kept model is examined anew, not trained anew: with `--keep_models` other measures cost their own time alone."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from lfu.study.folder import MODEL, Place
from lfu.support.files import new_folder

# what `lfu.study.train.train` returns, beside the cost
OF_TRAINING = ("steps", "rows", "trainable", "notes", "advice", "curve")


def reuse(place: Place, training: str) -> bool:
    """Takes the model of a run that was trained in the same way and examined in another, if one of the study is kept.

    Args:
        place: of the run that wants a model.
        training: its `Study.training_key`.

    Returns:
        whether there was one. Nothing is left behind if not.
    """
    for file in sorted(place.path.parent.glob("*/config.json")):
        other = file.parent
        if other == place.path or not (other / MODEL).is_dir() or _read(file).get("training") != training:
            continue
        if found := _read(other / "record.json") or _read(other / "trained.json"):
            with suppress(OSError):  # it is being removed
                _copy(other, place)
                cost = {name: value for name, value in found["cost"].items() if name != "measure_seconds"}
                place.keep_trained({name: found[name] for name in OF_TRAINING} | {"cost": cost})
                return True
    return False


def _copy(other: Path, place: Place) -> None:
    with new_folder(place.model) as work:
        shutil.copytree(other / MODEL, work, copy_function=_link, dirs_exist_ok=True)
    for name in ("log.jsonl", "curve.png"):
        shutil.copy2(other / name, place.path / name)


def _link(source: str, target: str) -> None:
    """Weights are written once and then replaced, not changed: two names for one file do."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
