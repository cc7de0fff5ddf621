"""Shipped studies: YAML files of flags of `lfu compare` or `lfu sweep`, merged under the flags that are given.

`verb` says which of the two a preset is for, `about` what it shows, `next` which commands to try afterwards; every
other key is a flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lfu import recipes
from lfu.support.errors import UserError, did_you_mean

FOLDER = Path(__file__).parent


def shipped() -> dict[str, Path]:
    """Name -> file."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def next_of(names: Sequence[str]) -> list[str]:
    """The commands to try after the shipped ones among these presets."""
    return [line for name in names if name in shipped() for line in recipes.read(shipped()[name]).get("next", [])]


def words_of(name: str, verb: str) -> list[str]:
    """A preset, by name or path, as flags of `verb`. Raises UserError: no such preset, or one for the other verb."""
    presets, path = shipped(), Path(name).expanduser()
    found = presets.get(name) or (path if path.is_file() else None)
    if found is None:
        listed = ", ".join(presets)
        raise UserError(f"--preset {name}: no such file; shipped are {listed}.{did_you_mean(name, presets)}")
    settings: dict[str, Any] = recipes.read(found)
    wanted = settings.pop("verb", verb)
    for about in ("about", "next"):
        settings.pop(about, None)
    if wanted != verb:
        raise UserError(f"--preset {name} is for lfu {wanted}, not for lfu {verb}")
    params = settings.pop("param", {})
    if not isinstance(params, dict):
        raise UserError(f"--preset {name}: param must be a mapping of names to lists of values")
    words = recipes.as_flags(settings)
    for param, values in params.items():
        words += ["--param", f"{param}={','.join(str(value) for value in values)}"]
    return words
