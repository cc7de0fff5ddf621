"""The probes of `lfu probe`: one file per kind, imported when it is asked for; here what they share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lfu.cli.models import Loading
from lfu.cli.models import template as template  # the flag, which most probes have
from lfu.support.flags import at_least_one, flag, not_negative

Found = tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]  # `make_record`'s models, settings, results


@dataclass(kw_only=True)
class Probe(Loading):
    """What every probe has. A kind is a subclass with further flags, and the docstring of its file is its help."""

    output_dir: str = flag(
        "all probes", "", "folder for record and report; those of an earlier probe are replaced (default: "
        "runs/probe-KIND)", metavar="DIR",
    )  # fmt: skip
    limit: int | None = flag("all probes", None, "use only the first N items", type=at_least_one)
    seed: int = flag("all probes", 0, "seed of everything random", type=not_negative)
    batch_size: int = flag("all probes", 8, "items per forward pass", type=at_least_one)

    def record(self, command: str) -> dict[str, Any]:
        """The record of what is measured; `command`: how to measure it again."""
        from lfu.evaluation.record import make_record

        models, settings, results = self.measure()
        named: dict[str, Any] = {"models": models, "settings": settings, "results": results}
        return make_record(type(self).__name__.lower(), **named, command=command, seed=self.seed)

    def measure(self) -> Found:
        """Measures, one model in memory at a time."""
        raise NotImplementedError
