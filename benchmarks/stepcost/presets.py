"""What is measured when nothing is said: a set of flags under those that are given."""

from __future__ import annotations

from typing import Any

ALL = ["sft", "trainer", "oracle", "decoder", "decoder_unpadded", "lora", "steering", "own", "sam"]
QUICK = ["sft", "decoder", "lora", "steering"]

PRESETS: dict[str, dict[str, Any]] = {
    # the table of docs/performance.md
    "main": {"theta": ["lora", "full"], "size": "135m", "variants": ALL, "rounds": 5},
    # how cost grows, on a CPU
    "curves": {
        "theta": ["lora", "full"], "size": "30m", "variants": QUICK, "rounds": 3, "memory": False,
        "curve": [
            ("batch", [1, 2, 4, 8]), ("length", [64, 128, 256, 512]), ("size", ["30m", "70m", "135m"]),
            ("layers", [4, 8, 12]), ("rank", [2, 8, 32]),
        ],
    },
    # one call of ten minutes on a GPU: the biggest last, so that a deadline costs the least
    "gpu": {
        "theta": ["lora", "full"], "size": "360m", "batch": 8, "length": 512, "dtype": "bfloat16", "rounds": 10,
        "variants": ["sft", "trainer", "decoder", "decoder_unpadded", "lora", "steering", "own", "sam"],
        "curve": [("length", [128, 2048]), ("size", ["135m", "1.7b", "8b"])], "profile": True,
    },
    # does it run?
    "tiny": {
        "theta": ["lora", "full"], "size": "tiny", "batch": 2, "length": 24, "variants": ALL, "rounds": 2,
        "memory": False, "curve": [("length", [12])],
    },
}  # fmt: skip
