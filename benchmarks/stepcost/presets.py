"""What is measured when nothing is said: a set of flags under those that are given."""

from __future__ import annotations

from typing import Any

from stepcost.curves import parse_curve

ALL = ["sft", "trainer", "oracle", "decoder", "decoder_unpadded", "lora", "steering", "own", "sam"]
QUICK = ["sft", "decoder", "lora", "steering"]
FEW = ["sft", "decoder", "decoder_unpadded", "lora", "steering", "own"]
GPU = ["sft", "decoder", "decoder_unpadded", "trainer", "oracle", "lora", "steering", "own"]
CHEAPER = [
    "sft", "lora", "lora:every=2", "lora:every=4", "lora:part=0.5", "lora:part=0.25", "lora:stale=2", "lora:stale=4",
    "lora:random_layers=8", "lora:layers=early", "lora:budget=1.3", "steering",
]  # fmt: skip

# `also`: further cases, each with what differs from the first one's and settings of its own. `memory`: the axis along
# which alone it is measured, or all (True). `curve_variants`: what is measured off the first case.
PRESETS: dict[str, dict[str, Any]] = {
    # the tables of docs/performance.md
    "main": {
        "theta": ["lora", "full"], "size": "135m", "variants": ALL, "rounds": 5,
        "also": [{
            "theta": "lora", "length": 512, "variants": ["sft", "decoder_unpadded", "lora"], "rounds": 2,
        }],
    },
    # the approximate forms
    "cheaper": {"theta": ["lora"], "size": "135m", "variants": CHEAPER, "rounds": 3, "memory": False},
    # how cost grows, on a CPU; the sizes on one row, the smallest first
    "curves": {
        "theta": ["lora", "full"], "size": "30m", "variants": QUICK, "rounds": 1, "memory": "length",
        "curve": [*map(parse_curve, (
            "length=64,128,256,512", "batch=1,2,4,8", "layers=4,8", "rank=2,32",
            "size=30m,70m,135m,360m,500m@batch=1",
        ))],
    },
    # some minutes on a GPU, what says most first; each case has its own limit
    "gpu": {
        "theta": ["lora"], "size": "8b", "batch": 8, "length": 512, "dtype": "bfloat16", "rounds": 3,
        "variants": GPU, "flops": False, "case_seconds": 60,
        "also": [
            {"size": "135m", "variants": GPU, "rounds": 3},
            {"size": "8b", "theta": "full", "variants": FEW, "rounds": 2},
            {"size": "135m", "theta": "full", "variants": FEW, "rounds": 3},
            {"size": "1.7b", "variants": FEW, "rounds": 2},
            {"size": "1.7b", "theta": "full", "variants": FEW, "rounds": 2},
            *({"size": size, "length": length, "variants": QUICK, "rounds": 2}
              for length in (128, 2048) for size in ("8b", "135m", "1.7b")),
        ],
    },
    # does it run?
    "tiny": {
        "theta": ["lora", "full"], "size": "tiny", "batch": 2, "length": 24, "variants": ALL, "rounds": 2,
        "memory": False, "curve": [parse_curve("length=12")],
    },
}  # fmt: skip
