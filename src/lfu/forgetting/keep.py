"""The callback's memory, in one small file: what the untouched model said, and every reading so far."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from lfu.forgetting.measure import Answers
from lfu.forgetting.written import Written
from lfu.support.files import write_bytes

FILE = "forgetting.safetensors"


@dataclass
class Reading:
    """One measurement of the model in training.

    Attributes:
        step, epoch: when.
        answers: item by item.
        figures: as trackers see them, without `forgetting/`.
        over: the measures that are over their budget, by the figures alone.
        shown: those of them that are so beyond the noise.
    """

    step: int
    epoch: float
    answers: Answers
    figures: dict[str, float]
    over: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)


@dataclass
class Memory:
    """What is needed to go on after a kill.

    Attributes:
        asked: what decided on the items (names and sizes of the sets, seed): a resumed run must ask the same.
        before: the untouched model's answers.
        written: what it wrote.
        readings: in order of their steps.
        share: `Share.kept`.
    """

    asked: dict[str, Any]
    before: Answers
    written: Written
    share: dict[str, Any] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all.

        Raises:
            OSError: it can't be written.
        """
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
