"""The probes of `lfu probe`: one file per kind, imported when it is asked for; here what they share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lfu.cli.models import Loading
from lfu.data.templates import TEMPLATES
from lfu.support.flags import at_least_one, flag, not_negative, option


class Found(NamedTuple):
    """What a probe measured, as `make_record` takes it."""

    models: Mapping[str, Any]
    settings: Mapping[str, Any]
    results: Mapping[str, Any]


@dataclass(kw_only=True)
class Probe(Loading):
    """The flags that every probe has. Its own kind is a subclass with further ones, whose docstring is its help."""

    output_dir: str = flag(
        "all probes", "", "folder for record and report; those of an earlier probe are replaced (default: "
        "runs/probe-KIND)", metavar="DIR",
    )  # fmt: skip
    limit: int | None = flag("all probes", None, "use only the first N items", type=at_least_one)
    seed: int = flag("all probes", 0, "seed of everything random", type=not_negative)
    batch_size: int = flag("all probes", 8, "items per forward pass", type=at_least_one)

    def earlier(self) -> dict[str, Any] | None:
        """A record that was made before and answers the question, if there is one."""
        return None

    def measure(self) -> Found:
        """Measures, one model in memory at a time."""
        raise NotImplementedError


def template() -> Any:
    """`--template`, as `lfu train` has it."""
    return option(
        "auto", "how questions become prompts; auto means chat if the model has a chat template, else alpaca",
        choices=TEMPLATES,
    )  # fmt: skip
