"""The optional packages: which extra installs what, and one line for what is missing."""

import importlib.util
from collections.abc import Iterable

from lfu.support.errors import UserError
from lfu.support.words import and_

# extra -> module -> package, as in pyproject.toml
EXTRAS: dict[str, dict[str, str]] = {
    "train": {"trl": "trl", "peft": "peft", "accelerate": "accelerate", "datasets": "datasets", "rich": "rich"},
    "report": {"matplotlib": "matplotlib", "jinja2": "jinja2"},
    "eval": {"lm_eval": "lm-eval"},
    "demo": {"gguf": "gguf"},
    "qlora": {"bitsandbytes": "bitsandbytes"},
    "cluster": {"submitit": "submitit"},
    "deepspeed": {"deepspeed": "deepspeed"},
}


def missing(*extras: str) -> list[str]:
    """The packages of these extras that are not installed. Nothing is imported."""
    modules = {module: package for extra in extras for module, package in EXTRAS[extra].items()}
    return [package for module, package in modules.items() if importlib.util.find_spec(module) is None]


def need(what: str, *extras: str) -> None:
    """Raises UserError, with the command that installs it, if a package of these extras is missing."""
    if packages := missing(*extras):
        raise UserError(f"{what} needs {and_(packages)}: {install([e for e in extras if missing(e)])}")


def explained(what: str, error: ModuleNotFoundError) -> str | None:
    """One line for an import that failed because an optional package is missing; None for any other import."""
    module = (error.name or "").split(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
    return extra and f"{what} needs {EXTRAS[extra][module]}: {install([extra])}"


def install(extras: Iterable[str]) -> str:
    """The command that installs these extras."""
    return f"pip install 'lfu-tuning[{','.join(extras)}]'"
