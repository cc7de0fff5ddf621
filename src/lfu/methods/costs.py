"""What a method's training step costs beside SFT's, as measured by benchmarks/method_cost.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COSTS = Path(__file__).parent / "costs.json"


def measured() -> dict[str, Any]:
    """`ratio`: method -> `lora` or `full` -> step time over SFT's; how and where it was measured, too."""
    return json.loads(COSTS.read_text(encoding="utf-8"))
