"""LfUTrainer under DDP and FSDP2, as accelerate makes them: one process with the whole batch, in float64."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from trainers import BF16, CASES, CLIPPED, CUT, everything, reference, saved, train
from two import both

from lfu.training.checkpoints import RUN_FILE, STATE_FILE

# TRL's fused loss keeps float32 sums whatever the model's dtype; checkpointed runs are float32 in parts
TOLERANCE = 1e-7
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


pytestmark = pytest.mark.timeout(900)  # two processes on a busy machine wait for each other


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trainers")


@pytest.fixture(scope="module")
def told(folder):
    return both(everything, folder / "told", folder, TORCH >= (2, 8))


def assert_close(found, wanted):
    largest = max(float(w.abs().max()) for w in wanted.values())
    assert max(float((found[name] - w).abs().max()) for name, w in wanted.items()) < TOLERANCE * largest


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(told, folder, case):
    """Weights after two updates of two micro-batches; the rows' answers differ in length between the processes."""
    wanted = reference(case, folder)
    for one in told:
        assert_close(one[case]["weights"], wanted["weights"])
    ours, theirs = (log[0] for log in (told[0][case]["log"], wanted["log"]))
    for name in ("lfu/sft_loss", "lfu/consistency", "lfu/ascent_grad_norm"):
        if name in theirs:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)  # TRL sums it in float32
    if "clipped" in case and not (case.startswith("fsdp2") and TORCH < (2, 8)):  # which logs one shard's norm
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
        assert ours["grad_norm"] > 2 * CLIPPED
    assert told[0][case]["wrapper"].startswith("FSDP" if case.startswith("fsdp2") else "DistributedDataParallel")


def test_every_process_sees_one_gradient_ratio(told):
    one, other = (process["ddp, lora, cut"]["resumed"]["record"] for process in told)
    assert one == other
    assert one["lam"] > 0


@pytest.mark.parametrize(("wrapper", "theta"), CUT)
def test_resume_continues_bit_for_bit_and_one_process_writes(told, folder, wrapper, theta):
    whole, resumed = (told[0][f"{wrapper}, {theta}, cut"][name] for name in ("whole", "resumed"))
    assert whole["weights"].keys() == resumed["weights"].keys()
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, resumed["weights"][name]), name
    assert whole["record"] == resumed["record"]
    run = folder / f"{wrapper} {theta}"
    assert {path.name for path in run.iterdir()} >= {"checkpoint-1", "checkpoint-2", "final"}
    assert not list(run.rglob(".writing-*"))
    checkpoint = run / "checkpoint-1"
    assert {path.name for path in checkpoint.glob("lfu*")} == {RUN_FILE, STATE_FILE}
    assert set(load_file(checkpoint / STATE_FILE)) == {
        "lfu/calls", "lfu/random", "lfu/auxiliary/groups", "lfu/lam/mean_log", "lfu/lam/weight",
    }  # fmt: skip


def test_a_checkpoint_that_torch_cannot_resume_is_one_line(told):
    for one in told:
        assert "checkpoint-1 does not fit this model and these settings: " in one["fsdp2, no state"]
        assert "\n" not in one["fsdp2, no state"]


@pytest.mark.parametrize(("wrapper", "theta"), CUT)
@pytest.mark.parametrize("name", ["final", "loaded"])
def test_what_is_saved_is_the_whole_trained_model(told, folder, wrapper, theta, name):
    """The model at the end of a run, and that of a complete run's last checkpoint, which is loaded without training."""
    wanted = told[0][f"{wrapper}, {theta}, cut"]["whole"]["weights"]
    found = saved(folder / f"{wrapper} {theta}" / name, theta)
    assert found.keys() == wanted.keys()
    for key, weight in wanted.items():
        assert torch.equal(found[key], weight), key


@pytest.mark.skipif(TORCH < (2, 8), reason="FSDP2 takes one dtype for all weights of a block")
def test_a_float32_adapter_on_a_bf16_base_is_trained_on_shards(told, folder):
    one, other = (process["fsdp2, bf16"]["weights"] for process in told)
    _, theta, options = BF16
    wanted = train(folder / "one", None, theta, options)["weights"]
    start = train(folder / "one", None, theta, options | {"learning_rate": 0.0})["weights"]
    assert {str(p.dtype) for name, p in one.items() if "lora_" in name} == {"torch.float32"}
    flat = lambda weights: torch.cat([p.flatten() for name, p in weights.items() if "lora_" in name])
    assert torch.equal(flat(one), flat(other))
    assert torch.dist(flat(one), flat(wanted)) < 0.2 * torch.dist(flat(wanted), flat(start))


def test_embedding_noise_is_each_process_its_own_and_the_weights_are_one(told):
    one, other = (process["ddp, neftune"]["weights"] for process in told)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(weight.isfinite().all() for weight in one.values())


@pytest.mark.parametrize(
    ("refused", "way_out"),
    [("fsdp, own", "auxiliary='lora'"), ("fsdp, sam", "use DDP"), ("fsdp, kl", "use DDP"), ("fsdp, gem", "use DDP")],
)
def test_what_shards_cannot_do_is_refused_in_one_line(told, refused, way_out):
    assert way_out in told[0][refused]
    assert "\n" not in told[0][refused]
