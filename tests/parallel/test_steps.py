"""Two processes with half of every micro-batch each are one process with the whole, in float64."""

from __future__ import annotations

import pytest
import torch
from steps import CASES, TROUBLED, TROUBLES, alike, everything, update
from tiny import relative_difference
from two import both

from lfu import LfUStep
from lfu.parallel.one import touch
from lfu.step.record import Record, Skip

pytestmark = pytest.mark.timeout(900)  # two processes on a busy machine wait for each other


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return both(everything, tmp_path_factory.mktemp("steps"))


def agrees(found, wanted):
    (gradients, records), (whole_gradients, whole_records) = found, wanted
    assert relative_difference(gradients, whole_gradients) < 1e-10
    for mine, whole in zip(records, whole_records, strict=True):
        assert mine["skipped"] == whole["skipped"]
        for name in ("sft_loss", "consistency", "ascent_grad_norm", "tokens", "lam"):
            assert mine[name] == pytest.approx(whole[name], rel=1e-9, nan_ok=True), name
        assert mine["consistency_per_layer"] == pytest.approx(whole["consistency_per_layer"], rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(told, case):
    wanted = update(case)
    for one in told:
        agrees(one["updates"][case], wanted)
    records = [one["updates"][case][1] for one in told]
    assert records[0] == records[1]  # the gradient ratio too
    assert all(record["gradient_ratio"] > 0 for record in records[0] if record["form"] != "not due")


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_of_rows_that_are_alike_the_gradient_ratio_is_that_of_one_process(told, wrapper):
    """Without earlier gradients autograd keeps the first backward's tensor and adds the second's to it."""
    found, wanted = told[0]["alike"][wrapper], alike(None)
    for name in ("gradient_ratio", "gradient_cosine"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-9), name


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("case", TROUBLED)
def test_trouble_in_one_process_is_trouble_of_the_whole_micro_batch(told, case, trouble):
    """Nobody waits for ever, and the earlier micro-batch's gradient is reduced even where the last one is dropped."""
    wanted = update(case, trouble=trouble)
    assert wanted[1][-1]["skipped"] == ("non-finite loss" if trouble == "nan loss" else None)
    for one in told:
        agrees(one["troubles"][case, trouble], wanted)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_theta_is_reduced_as_often_as_by_sft(told, wrapper):
    counts = told[0]["communication"][wrapper]
    assert counts["lfu"] == counts["sft"] > 0


def test_a_local_ascent_is_each_process_its_own(told):
    found = [one["scopes"] for one in told]
    for scope in ("global", "local"):  # theta's gradient is averaged, whatever the ascent was
        assert relative_difference(found[0][scope][0], found[1][scope][0]) == 0
    assert relative_difference(found[0]["local"][0], found[0]["global"][0]) > 1e-3
    norms = [one["local"][1]["ascent_grad_norm"] for one in found]
    assert norms[0] != norms[1]
    assert found[0]["global"][1]["ascent_grad_norm"] == found[1]["global"][1]["ascent_grad_norm"]


def test_what_shards_cannot_do_is_refused_with_what_they_can(told):
    own, kl = told[0]["refusals"]
    assert "auxiliary='lora'" in own
    assert "'mse'" in kl


def test_deepspeeds_engine_in_a_loop_of_ones_own_is_refused():
    """By its name: DeepSpeed need not be installed."""
    engine = type("DeepSpeedEngine", (torch.nn.Module,), {})()
    with pytest.raises(ValueError, match="use LfUTrainer, or DDP or FSDP2"):
        LfUStep(engine)


@pytest.mark.parametrize("reason", Skip)
def test_every_reason_to_skip_can_travel(reason):
    one, other = Record(tokens=2, sft_loss=1.0), Record(skipped=reason, tokens=1, sft_loss=4.0)
    both = [one.numbers(), other.numbers()]
    one.become_everyones(both)
    other.become_everyones(both)
    assert one.skipped == other.skipped == (reason if "non-finite" in reason else None)
    assert (one.sft_loss, one.tokens) == (other.sft_loss, other.tokens) == (2.0, 3)
    alone = Record(skipped=reason)
    alone.become_everyones([alone.numbers()] * 2)
    assert alone.skipped == reason


def test_touch_reaches_all_of_theta_and_adds_nothing():
    theta = [torch.ones(2, 3, requires_grad=True), torch.ones(4, dtype=torch.bfloat16, requires_grad=True)]
    theta[0].sum().backward()
    touch(theta).backward()
    assert torch.equal(theta[0].grad, torch.ones(2, 3))
    assert torch.equal(theta[1].grad, torch.zeros(4, dtype=torch.bfloat16))
