"""LfUTrainer under DeepSpeed (ZeRO-1 to 3): two processes are one with the whole batch, to float32's precision.

*soak*: DeepSpeed compiles a part of itself, and `make soak` alone installs it.
"""

from __future__ import annotations

import pytest
import torch
from trainers import CLIPPED, launched, saved, trainer, whole
from trainers import train as in_one_process
from two import both

from lfu.training.checkpoints import STATE_FILE

pytest.importorskip("deepspeed")
from zero import CASES, CUT, POISONED, REFUSED, everything, poison

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def told(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        kept = {"dtype": torch.float32, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
        in_one_process(folder / "one process", None, "lora", kept)
        return both(everything, folder / "told", folder)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(told, folder, case):
    _, theta, options = CASES[case]
    wanted = in_one_process(folder / "one", None, theta, {"dtype": torch.float32} | options)
    start = in_one_process(folder / "one", None, theta, {"dtype": torch.float32, "learning_rate": 0.0} | options)
    for one in told:
        assert one[case]["wrapper"] == "DeepSpeedEngine"
        for name, weight in wanted["weights"].items():
            assert torch.dist(one[case]["weights"][name], weight) <= 1e-4 * torch.dist(weight, start["weights"][name])
    ours, theirs = (log[0] for log in (told[0][case]["log"], wanted["log"]))
    for name in ("lfu/sft_loss", "lfu/consistency", "lfu/ascent_grad_norm"):
        if name in theirs:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    if "clipped" in case:
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["grad_norm"] > 2 * CLIPPED
    assert told[0][case]["record"] == told[1][case]["record"]  # the gradient ratio too


@pytest.mark.parametrize(("stage", "theta"), CUT)
def test_resume_continues_bit_for_bit_and_what_is_saved_is_what_was_trained(told, folder, stage, theta):
    runs = told[0][f"{stage}, {theta}, cut"]
    for name, weight in runs["whole"]["weights"].items():
        assert torch.equal(weight, runs["resumed"]["weights"][name]), name
    assert runs["whole"]["record"] == runs["resumed"]["record"]
    run = folder / f"{stage} {theta}"
    assert (run / "checkpoint-1" / STATE_FILE).is_file()
    assert not list(run.rglob(".writing-*"))
    loaded = saved(run / "final", theta)
    trained = [name for name in loaded if theta == "full" or "lora_" in name]  # the base was drawn in float64 there
    assert trained
    for name in trained:
        weight = loaded[name]
        assert torch.equal(runs["whole"]["weights"][name].double(), weight.double()), name


@pytest.mark.parametrize("where", POISONED)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_bad_loss_in_one_process_is_skipped_by_all(told, folder, stage, where):
    """As by one process with the whole batch: nothing of an earlier update is left in DeepSpeed's buffers."""
    launched(None)
    alone = trainer(folder / "one", 1, "full", torch.float32, max_steps=3)
    start = whole(alone.model)
    poison(alone, POISONED[where])
    alone.train()
    wanted = whole(alone.model)
    for one in (process[f"{stage}, {where} bad"] for process in told):
        for name, weight in wanted.items():
            assert torch.dist(one["weights"][name], weight) <= 1e-4 * torch.dist(weight, start[name]), name
        skipped = [len({2 * update, 2 * update + 1} & POISONED[where]) / 2 for update in range(3)]
        assert [log["lfu/skipped"] for log in one["log"] if "loss" in log] == skipped


def test_a_checkpoint_without_deepspeed_is_one_line(told):
    said = told[0]["misfit"]
    assert "checkpoint-1 does not fit this model and these settings: " in said
    assert "\n" not in said


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_weights(told, stage):
    one = told[0][f"{stage}, bf16"]
    assert {weight.dtype for weight in one["weights"].values()} == {torch.bfloat16}
    assert one["record"]["skipped"] is None
    assert one["record"]["consistency"] > 0
    assert one["log"][1]["loss"] < one["log"][0]["loss"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_zero_cannot_do_is_refused_in_one_line(told, name):
    said = told[0]["refused"][name]
    assert REFUSED[name][2] in said
    assert "\n" not in said
