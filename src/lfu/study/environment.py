"""What of a machine decides results: its kind of device, and the versions of the packages.

Who trains leaves a note of it in the study's folder. Who only plans or reports, on a cluster's login node or a laptop
that the folder was copied to, goes by the note: the runs' keys are those of the machine that trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lfu.evaluation.record import versions
from lfu.support.files import dump_json, write_text

NOTE = "environment.json"  # in the study's folder


def own() -> dict[str, Any]:
    """This machine's."""
    return {"device": device(), "versions": versions()}


def noted(folder: Path) -> dict[str, Any] | None:
    """That of the machine that trained last in the study's folder; None if none has."""
    try:
        return json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def note(folder: Path, environment: dict[str, Any]) -> None:
    """Leaves it for those that plan and report. Raises OSError: the folder can't be written."""
    if noted(folder) != environment:
        write_text(folder / NOTE, dump_json(environment))


def device() -> str:
    """`cuda` or `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"
