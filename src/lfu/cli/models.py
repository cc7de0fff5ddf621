"""The models that a command is given: their labels, and how they are loaded, one at a time."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lfu.data.templates import TEMPLATES
from lfu.support.errors import UserError, value_errors_are_the_users
from lfu.support.flags import flag, option, switch
from lfu.support.quiet import quiet_libraries
from lfu.support.words import tell

T = TypeVar("T")

DTYPES = ["auto", "bfloat16", "float16", "float32"]
LABELLED = re.compile(r"([^/\\=]+)=(.+)")
HELP = "a hub name, a folder of a model or adapter, or smollm2, gemma3-270m; LABEL=MODEL names it in the report"
BASE_AND_TUNED = f"{HELP}; for an adapter alone, its base model is found"


def template() -> Any:
    """`--template`, as `lfu train` has it."""
    return option(
        "auto", "how questions become prompts; auto means chat if the model has a chat template, else alpaca",
        choices=TEMPLATES,
    )  # fmt: skip


@dataclass(kw_only=True)
class Loading:
    """The flags of every command that loads models."""

    dtype: str | None = flag(
        "loading", None, "load the weights as this type (default: float32 on a CPU, as stored on a GPU)", choices=DTYPES
    )
    trust_remote_code: bool = switch("loading", "run code that comes with a model")

    @property
    def torch_dtype(self) -> str:
        """What models are loaded as."""
        import torch

        return self.dtype or ("auto" if torch.cuda.is_available() else "float32")

    def load(self, name: str, *, dtype: str | None = None) -> tuple[Any, Any]:
        """(model, tokenizer), the model on the GPU if there is one."""
        import torch

        from lfu.model.loading import load_model

        with quiet_libraries():
            model, tokenizer = load_model(
                name, dtype=dtype or self.torch_dtype, trust_remote_code=self.trust_remote_code
            )
        return model.to("cuda") if torch.cuda.is_available() else model, tokenizer

    def with_model(self, name: str, work: Callable[[Any, Any], T], *, dtype: str | None = None) -> T:
        """What `work(model, tokenizer)` returns; the model is then dropped. Its ValueErrors are the user's mistakes."""
        model, tokenizer = self.load(name, dtype=dtype)
        with value_errors_are_the_users():
            return work(model, tokenizer)

    def tokenizers(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Label -> tokenizer. They are small, so a wrong name is found before any model is loaded."""
        from lfu.model.loading import load_tokenizer

        return {label: load_tokenizer(name, trust_remote_code=self.trust_remote_code) for label, name in names.items()}

    def each(self, names: Mapping[str, str], work: Callable[[str, Any, Any], T]) -> tuple[dict[str, Any], dict[str, T]]:
        """(descriptions, what `work(label, model, tokenizer)` returned), by label; one model in memory at a time."""
        from lfu.evaluation.record import describe_model

        described: dict[str, Any] = {}
        found: dict[str, T] = {}
        for label, name in names.items():
            model, tokenizer = self.load(name)
            with value_errors_are_the_users():
                found[label] = work(label, model, tokenizer)
            described[label] = describe_model(name, model)
            del model  # before the next one is loaded
        tell_of_dtypes(described)
        return described, found


def tell_of_dtypes(described: Mapping[str, Mapping[str, Any]]) -> None:
    """Warns where models were loaded in different types, as on a GPU each is as it was stored."""
    if len({one["dtype"] for one in described.values()}) > 1:
        types = ", ".join(f"{label} as {one['dtype']}" for label, one in described.items())
        tell(f"lfu: warning: models were loaded {types}: the rounding is part of their difference; use --dtype float32")


def base_and_tuned(values: Sequence[str], kind: str) -> dict[str, str]:
    """Label -> name of BASE (its label is `base` unless it has one of its own) and of the TUNED models after it."""
    from lfu.model.loading import adapter_base, is_adapter

    if len(values) == 1:
        _, name = _split(values[0])
        if not is_adapter(name):
            raise UserError(f"one model is not enough: lfu probe {kind} BASE TUNED (an adapter folder may stand alone)")
        values = [adapter_base(name), *values]
    base, name = _split(values[0])
    return labelled([f"{base or 'base'}={name}", *values[1:]])


def labelled(values: Sequence[str]) -> dict[str, str]:
    """Label -> name of models given as MODEL or LABEL=MODEL; the default label is the last part of the name."""
    found: dict[str, str] = {}
    for label, name in map(_split, values):
        label = label or Path(name).name or name
        if label in found:
            raise UserError(f"two models are called {label!r}: tell them apart, as in one={found[label]} other={name}")
        found[label] = name
    return found


def _split(value: str) -> tuple[str, str]:
    """(label or an empty text, name). A path that exists is never split."""
    match = LABELLED.fullmatch(value)
    return (match[1].strip(), match[2]) if match and not Path(value).expanduser().exists() else ("", value)
