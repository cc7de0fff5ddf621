"""ForgettingCallback under DDP and FSDP2: items dealt over two processes give the readings of one, and one writes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from forgetting.runs import curve, few, trainer
from pictures import one_pixel
from trainers import launched
from two import both

from lfu import ForgettingCallback

UPDATES = {"max_steps": 2, "eval_steps": 1}
CASES = [("ddp", "plain"), ("ddp", "sft, lora"), ("fsdp2", "plain"), ("fsdp2", "sft, lora")]

pytestmark = pytest.mark.timeout(900)  # two processes on a busy machine wait for each other


def measured(folder: Path, wrapper: str, name: str) -> dict[str, Any]:
    launched(wrapper)
    options = UPDATES | {"per_device_train_batch_size": 1, "optim": "sgd"}
    return with_and_without(
        lambda callbacks: trainer(name, folder / f"{wrapper} {name}", callbacks, **options),
        lambda model: [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()],
    )


def with_and_without(make: Callable[[list[Any]], Any], weights_of: Callable[[Any], list[Any]]) -> dict[str, Any]:
    """The curve, the page's lines and the weights of a run with the callback, and the weights of one without."""
    found: dict[str, Any] = {}
    for callbacks in ([], [ForgettingCallback(0.5, share_of_time=None, say=(lines := []).append)]):
        run = make(callbacks)
        run.train()
        found["with" if callbacks else "without"] = [p.detach().clone() for p in weights_of(run.model)]
    return found | {"curve": curve(run), "lines": lines, "wrapper": type(run.model_wrapped).__name__}


@lru_cache
def before_training(folder: Path, name: str) -> dict[str, Any]:
    """What one process reads of the model that it is about to train."""
    launched(None)
    run = trainer(name, folder / name, [ForgettingCallback(0.5, share_of_time=None)], max_steps=1)
    run.train()
    return curve(run)[0]


def everything(rank: int, folder: Path) -> list[dict[str, Any]]:
    few(setattr)
    one_pixel(setattr)
    return [measured(folder, *case) for case in CASES]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forgetting")
    return both(everything, folder / "told", folder), folder


@pytest.mark.parametrize("case", range(len(CASES)), ids=map(str, CASES))
def test_two_processes_read_what_one_reads(told, case, monkeypatch):
    wrapper = "FSDP" if CASES[case][0] == "fsdp2" else "DistributedDataParallel"
    assert told[0][0][case]["wrapper"].startswith(wrapper)
    read_what_one_reads(told, case, CASES[case], monkeypatch)


def read_what_one_reads(told, case, named, monkeypatch):
    """Both processes of a case: one curve, that of one process before training; one writes; the weights are SFT's."""
    (one, other), folder = told[0], told[1]
    setting, name = named
    one, other = one[case], other[case]
    assert one["curve"] == other["curve"]
    assert [point["step"] for point in one["curve"]] == [0, 1, 2]
    assert one["lines"]
    assert not other["lines"]
    for process in (one, other):
        assert all(torch.equal(a, b) for a, b in zip(process["with"], process["without"], strict=True))
    few(monkeypatch.setattr)
    one_pixel(monkeypatch.setattr)
    assert one["curve"][0] == pytest.approx(before_training(folder, name), rel=1e-4)
    assert one["curve"][-1]["forgetting/kl"] > 0
    assert (folder / f"{setting} {name}" / "forgetting" / "index.html").is_file()
