"""The models that a probe is given: their labels, and one of them in memory at a time."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lfu.support.errors import UserError, value_errors_are_the_users
from lfu.support.quiet import quiet_libraries

T = TypeVar("T")

LABELLED = re.compile(r"([^/\\=]+)=(.+)")
HELP = "a hub name, a model or adapter folder, or smollm2, gemma3-270m; LABEL=MODEL names it in the report"


def add_base_and_tuned(parser: argparse.ArgumentParser) -> None:
    """Positional BASE TUNED [TUNED ...]."""
    parser.add_argument(
        "models", nargs="+", metavar="BASE TUNED", help=f"{HELP}; for an adapter alone, its base model is found"
    )


def add_models(parser: argparse.ArgumentParser) -> None:
    """Positional MODEL [MODEL ...]."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help=HELP)


def base_and_tuned(values: Sequence[str], kind: str) -> dict[str, str]:
    """Label -> name of BASE, called `base` if it has no label of its own, and of the TUNED models after it.

    Raises:
        UserError: a single model that isn't an adapter; two of one label.
    """
    from lfu.model.loading import adapter_base, is_adapter

    if len(values) == 1:
        _, name = _split(values[0])
        if not is_adapter(name):
            raise UserError(f"one model is not enough: lfu probe {kind} BASE TUNED (an adapter folder may stand alone)")
        values = [adapter_base(name), *values]
    base, name = _split(values[0])
    return labelled([f"{base or 'base'}={name}", *values[1:]])


def labelled(values: Sequence[str]) -> dict[str, str]:
    """Label -> name of models given as MODEL or LABEL=MODEL; the default label is the last part of the name.

    Raises:
        UserError: two models of one label.
    """
    found: dict[str, str] = {}
    for label, name in map(_split, values):
        label = label or Path(name).name or name
        if label in found:
            raise UserError(
                f"two models are called {label!r}: tell them apart, as in first={found[label]} other={name}"
            )
        found[label] = name
    return found


def _split(value: str) -> tuple[str, str]:
    """(label or an empty text, name). A path that exists is a path, whatever signs are in it."""
    match = LABELLED.fullmatch(value)
    return (match[1].strip(), match[2]) if match and not Path(value).expanduser().exists() else ("", value)


def tokenizers(models: dict[str, str], given: argparse.Namespace) -> dict[str, Any]:
    """Label -> tokenizer: small, and a name that is wrong shows before any model is loaded.

    Raises:
        UserError: as `load_tokenizer`.
    """
    from lfu.model.loading import load_tokenizer

    return {label: load_tokenizer(name, trust_remote_code=given.trust_remote_code) for label, name in models.items()}


def each_model(
    names: dict[str, str], given: argparse.Namespace, work: Callable[[str, Any, Any], T]
) -> tuple[dict[str, Any], dict[str, T]]:
    """(descriptions, what `work(label, model, tokenizer)` gave), both by label; one model in memory at a time.

    Raises:
        UserError: as `with_model`.
    """
    from lfu.evaluation.record import describe_model

    described: dict[str, Any] = {}
    found: dict[str, T] = {}
    for label, name in names.items():

        def both(model: Any, tokenizer: Any, label: str = label, name: str = name) -> None:
            found[label] = work(label, model, tokenizer)
            described[label] = describe_model(name, model)

        with_model(name, given, both)
    return described, found


def with_model(name: str, given: argparse.Namespace, work: Callable[[Any, Any], T]) -> T:
    """`work(model, tokenizer)` with the model in memory (on the GPU if there is one), and only until it returns.

    Raises:
        UserError: if it can't be loaded; a ValueError of `work`'s becomes one.
    """
    import torch

    from lfu.model.loading import load_model

    gpu = torch.cuda.is_available()
    dtype = given.dtype or ("auto" if gpu else "float32")
    with quiet_libraries():
        model, tokenizer = load_model(name, dtype=dtype, trust_remote_code=given.trust_remote_code)
    with value_errors_are_the_users():
        return work(model.to("cuda") if gpu else model, tokenizer)
