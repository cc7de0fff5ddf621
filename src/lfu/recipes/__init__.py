"""Recipes: YAML mappings of flags, by name or path, merged from left to right.

`llama-3.1-8b,gsm8k,reps` reads models/llama-3.1-8b.yaml, then data/gsm8k.yaml, then variants/reps.yaml: a key in a
later file replaces the same key of an earlier one, and `null` takes it back to its default. Nothing else is done to
them.
"""

import json
from pathlib import Path
from typing import Any

from lfu.support.errors import UserError
from lfu.support.files import named_yaml, read_yaml
from lfu.support.words import listed

FOLDER = Path(__file__).parent


def shipped() -> dict[str, Path]:
    """The shipped recipes by name, in the order models, data sets, variants, complete ones."""
    groups = ("models", "data", "variants", ".")
    return {path.stem: path for group in groups for path in sorted((FOLDER / group).glob("*.yaml"))}


def launches() -> dict[str, Path]:
    """The shipped files for `accelerate launch --config_file` by name, such as `accelerate/ddp`."""
    return {f"accelerate/{path.stem}": path for path in sorted((FOLDER / "accelerate").glob("*.yaml"))}


def find(name: str) -> Path:
    """The file of a shipped recipe's name, or of a path. Raises UserError: neither."""
    return named_yaml(name, shipped(), "recipe", listed="see: lfu recipes")


def read(path: Path) -> dict[str, Any]:
    """The settings in one recipe file, keys with underscores. Raises UserError: it can't be read, or is no mapping."""
    settings = read_yaml(path, "recipe")
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise UserError(
            f"recipe {path}: must be a mapping (`learning_rate: 2e-4`), this is a {type(settings).__name__}"
        )
    return {str(key).replace("-", "_"): value for key, value in settings.items()}


def parts(spec: str) -> list[tuple[Path, dict[str, Any]]]:
    """The files of a `spec` (names or paths separated by commas), each with its settings. Errors as `find`, `read`."""
    names = [spec] if Path(spec).expanduser().is_file() else listed(spec)
    if not names:
        raise UserError("recipe: the name is empty (see: lfu recipes)")
    return [(path, read(path)) for path in map(find, names)]


def as_flags(settings: dict[str, Any]) -> list[str]:
    """The settings written as command-line flags, so that one parser checks recipes and flags alike."""
    flags: list[str] = []
    for key, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(_word, value)]
        elif value is not None:
            flags.append(f"--{key}={_word(value)}")
    return flags


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | dict | list) else str(value)
