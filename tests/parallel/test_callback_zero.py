"""ForgettingCallback under DeepSpeed (ZeRO-2 and 3): two processes read what one reads, and the run is not changed.

*soak*: DeepSpeed compiles a part of itself, and `make soak` alone installs it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from forgetting.runs import curve, few, trainer
from test_callback_processes import measured as by_one
from trainers import launched
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from two import both
from zero import config

from lfu import ForgettingCallback

deepspeed = pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

CASES = [(stage, name) for stage in (2, 3) for name in ("plain", "sft, lora")]


def measured(folder: Path, stage: int, name: str) -> dict[str, Any]:
    """Curve, lines and weights of a run with the callback, and the weights of one without."""
    found: dict[str, Any] = {}
    for callbacks in ([], [ForgettingCallback(0.5, share_of_time=None, say=(lines := []).append)]):
        launched(None)
        unset_hf_deepspeed_config()
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false"}
        PartialState(backend="gloo")
        run = trainer(
            name, folder / f"{stage} {name}", callbacks, per_device_train_batch_size=1, optim="sgd", max_steps=4,
            deepspeed=config(stage, False), accelerator_config={"use_configured_state": True},
        )  # fmt: skip
        run.train()
        with deepspeed.zero.GatheredParameters(list(run.model.parameters()), enabled=stage == 3):
            found["with" if callbacks else "without"] = [p.detach().clone() for p in run.model.parameters()]
    return found | {"curve": curve(run), "lines": lines, "wrapper": type(run.model_wrapped).__name__}


def everything(rank: int, folder: Path) -> list[dict[str, Any]]:
    few(setattr)
    return [measured(folder, *case) for case in CASES]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forgetting")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        return both(everything, folder / "told", folder), folder


@pytest.mark.parametrize("case", range(len(CASES)), ids=map(str, CASES))
def test_two_processes_under_deepspeed_read_what_one_reads(told, case, monkeypatch):
    (one, other), folder = told[0], told[1]
    stage, name = CASES[case]
    one, other = one[case], other[case]
    assert one["wrapper"] == "DeepSpeedEngine"
    assert one["curve"] == other["curve"]
    assert [point["step"] for point in one["curve"]] == [0, 2, 4]
    assert one["lines"]
    assert not other["lines"]
    for process in (one, other):
        assert all(torch.equal(a, b) for a, b in zip(process["with"], process["without"], strict=True))
    few(monkeypatch.setattr)
    alone = by_one(folder, None, name)["curve"]
    for point, wanted in zip(one["curve"][:1], alone):  # before training the model is the same
        assert point == pytest.approx(wanted, rel=1e-4)
    assert one["curve"][-1]["forgetting/kl"] > 0
    assert (folder / f"{stage} {name}" / "forgetting" / "index.html").is_file()
