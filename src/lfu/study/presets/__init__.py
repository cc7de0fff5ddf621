"""Shipped studies: YAML files of flags of `lfu compare` or `lfu sweep`, merged under the flags that are given.

`verb` says which of the two a preset is for, `about` what it shows, `next` which commands to try afterwards; every
other key is a flag.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lfu import recipes
from lfu.support.errors import UserError
from lfu.support.files import named_yaml

FOLDER = Path(__file__).parent


def shipped() -> dict[str, Path]:
    """Name -> file."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def next_of(names: Sequence[str]) -> list[str]:
    """The commands to try after the shipped ones among these presets."""
    return [line for name in names if name in shipped() for line in recipes.read(shipped()[name]).get("next", [])]


def settings_of(name: str, verb: str) -> dict[str, Any]:
    """A preset's flags of `verb`, by name or path. Raises UserError: no such preset, or one for the other verb."""
    settings = recipes.read(named_yaml(name, shipped(), "--preset"))
    wanted, params = settings.pop("verb", verb), settings.get("param", {})
    if wanted != verb:
        raise UserError(f"--preset {name} is for lfu {wanted}, not for lfu {verb}")
    if not isinstance(params, dict):
        raise UserError(f"--preset {name}: param must be a mapping of names to lists of values")
    return {key: value for key, value in settings.items() if key not in ("about", "next")}
