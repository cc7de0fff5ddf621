"""The callback's memory, in one small file: what the untouched model said, and every reading so far."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from lfu.forgetting.answers import Answers
from lfu.forgetting.written import Written
from lfu.support.files import write_bytes

FILE = "forgetting.safetensors"


@dataclass
class Reading:
    """One measurement of the model in training."""

    step: int
    epoch: float
    answers: Answers
    figures: dict[str, float]  # as trackers see them, without `forgetting/`
    over: list[str] = field(default_factory=list)  # the measures that are over their budget, by the figures alone
    shown: list[str] = field(default_factory=list)  # those of them that are so beyond the noise


@dataclass
class Memory:
    """What is needed to go on after a kill."""

    asked: dict[str, Any]  # the seed and the items' digests: a resumed run must ask the same
    before: Answers  # the untouched model's
    written: Written  # by the untouched model
    share: dict[str, Any] = field(default_factory=dict)  # `Share.kept`
    readings: list[Reading] = field(default_factory=list)  # in order of their steps

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all. Raises OSError: it can't be written."""
        from safetensors.torch import save

        plain = {name: value for name, value in vars(self).items() if name not in ("written", "before", "readings")}
        plain |= {"before": asdict(self.before), "readings": [asdict(reading) for reading in self.readings]}
        write_bytes(path, save(vars(self.written), {"memory": json.dumps(plain)}))

    @classmethod
    def load(cls, path: Path, step: int) -> Self | None:
        """What was known at `step`; None where there is no such file, or it can't be read."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                plain = json.loads(file.metadata()["memory"])
                written = Written(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            readings = [Reading(**each | {"answers": Answers(**each["answers"])}) for each in plain.pop("readings")]
            before = Answers(**plain.pop("before"))
            return cls(before=before, written=written, readings=[r for r in readings if r.step <= step], **plain)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
