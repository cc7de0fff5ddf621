"""ForgettingCallback under DeepSpeed (ZeRO-2 and 3): two processes read what one reads, and the run is not changed.

*soak*: DeepSpeed compiles a part of itself, and `make soak` alone installs it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from forgetting.runs import few, trainer
from pictures import one_pixel
from test_callback_processes import UPDATES, read_what_one_reads, with_and_without
from trainers import launched
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from two import both
from zero import config

deepspeed = pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

CASES = [(stage, name) for stage in (2, 3) for name in ("plain", "sft, lora")]


def measured(folder: Path, stage: int, name: str) -> dict[str, Any]:
    def make(callbacks: list[Any]) -> Any:
        launched(None)
        unset_hf_deepspeed_config()
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false"}
        PartialState(backend="gloo")
        return trainer(
            name, folder / f"{stage} {name}", callbacks, per_device_train_batch_size=1, optim="sgd", **UPDATES,
            deepspeed=config(stage, False), accelerator_config={"use_configured_state": True},
        )  # fmt: skip

    def weights_of(model: Any) -> list[Any]:
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            return [p.detach().clone() for p in model.parameters()]

    return with_and_without(make, weights_of)


def everything(rank: int, folder: Path) -> list[dict[str, Any]]:
    few(setattr)
    one_pixel(setattr)
    return [measured(folder, *case) for case in CASES]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forgetting")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        return both(everything, folder / "told", folder), folder


@pytest.mark.parametrize("case", range(len(CASES)), ids=map(str, CASES))
def test_two_processes_under_deepspeed_read_what_one_reads(told, case, monkeypatch):
    assert told[0][0][case]["wrapper"] == "DeepSpeedEngine"
    read_what_one_reads(told, case, CASES[case], monkeypatch)
