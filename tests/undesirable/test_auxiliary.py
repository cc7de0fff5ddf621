"""What an auxiliary of one's own needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny import DEVICE, tiny_batch, tiny_model

from lfu import LfUConfig, LfUStep
from lfu.undesirable import KINDS, Steering


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_guides_auxiliary_fits_in_one_class(dtype):
    """The code block of docs/own-loop.md, run as it stands there."""
    guide = (Path(__file__).parent.parent.parent / "docs" / "own-loop.md").read_text()
    block = next(b for b in re.findall(r"```python\n(.*?)```", guide, re.S) if "class EmbeddingShift" in b)
    names: dict = {}
    exec(block, names)
    record = LfUStep(tiny_model("llama", dtype=dtype), auxiliary=names["EmbeddingShift"]())(tiny_batch())
    assert record.skipped is None
    assert record.consistency > 0


def test_every_auxiliary_with_a_name_is_found(tmp_path):
    assert list(KINDS) == ["lora", "own", "steering"]

    class Mine(Steering):
        name = "mine"

    try:
        config = LfUConfig(str(tmp_path), auxiliary="mine", use_cpu=DEVICE == "cpu", report_to="none")
        assert isinstance(config.make("auxiliary"), Mine)
        assert LfUStep(tiny_model("llama"), auxiliary="mine")(tiny_batch()).skipped is None
    finally:
        del KINDS["mine"]
