"""EMA against the average written out weight by weight, on every kind of theta; resume to the bit."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from bench import small_model, tiny_trainer
from peft import PromptTuningConfig
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from lfu.methods import methods_of
from lfu.methods.ema import EMA


class Trajectory(TrainerCallback):
    """theta after each update."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.seen = [self.now()]
        trainer.add_callback(self)

    def now(self):
        return {n: p.detach().clone() for n, p in self.trainer.model.named_parameters() if p.requires_grad}

    def on_step_end(self, *args, **more):
        self.seen.append(self.now())


def weights(decays):
    """How much theta_0, ..., theta_T weigh in m_T."""
    found = [1.0]
    for d in decays:
        found = [w * d for w in found] + [1 - d]
    return found


@pytest.mark.parametrize(("theta", "knobs", "decays"), [
    ("full", "", [2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15]),
    ("full", "ema.decay=0.3", [2 / 11, 3 / 12, 0.3, 0.3, 0.3]),
    ("full", "ema.decay=0.9,ema.warmup=false", [0.9] * 5),
    ("lora", "ema.decay=0.3", [2 / 11, 3 / 12, 0.3, 0.3, 0.3]),
    ("dora", "ema.decay=0.9,ema.warmup=false", [0.9] * 5),
    ("subset", "", [2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15]),
])  # fmt: skip
def test_what_is_kept_is_the_average(tmp_path, theta, knobs, decays):
    t = tiny_trainer("ema", tmp_path, theta=theta, method_args=knobs, max_steps=5)
    path = Trajectory(t)
    t.train()
    assert len(path.seen) == 6
    for name, kept in path.now().items():
        expected = sum(w * step[name] for w, step in zip(weights(decays), path.seen))
        torch.testing.assert_close(kept, expected, rtol=1e-12, atol=1e-14)
        assert not torch.equal(kept, path.seen[-1][name])
    assert any("moving average" in note for note in t.notes)


def test_the_training_itself_is_sfts(tmp_path):
    losses = [
        [entry["loss"] for entry in t.state.log_history if "loss" in entry]
        for t in (tiny_trainer(name, tmp_path) for name in ("sft", "ema"))
        if t.train()
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("updates", [1, 10, 100, 800])
def test_with_the_warm_up_the_start_is_soon_forgotten_and_without_it_not(updates):
    product = math.prod(EMA(decay=1.0).decay_at(t) for t in range(1, updates + 1))
    # the product of (1 + t) / (10 + t) telescopes
    expected = math.factorial(10) / math.prod(updates + k for k in range(2, 11))
    assert product == pytest.approx(expected, rel=1e-9)
    without = math.prod(EMA(warmup=False).decay_at(t) for t in range(1, updates + 1))
    assert without == pytest.approx(0.999**updates)
    assert without > 0.4


def test_the_average_spans_about_the_last_tenth():
    w = weights([EMA().decay_at(t) for t in range(1, 501)])
    mean_age = sum(weight * (500 - step) for step, weight in enumerate(w)) / 500
    assert 0.08 < mean_age < 0.12


def test_a_narrow_theta_is_averaged_in_float32(tmp_path):
    """Steps below bf16's resolution of the average are lost in a bf16 average, and not here."""
    method = EMA(decay=0.999, warmup=False)
    layer = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    stand_in = SimpleNamespace(
        anatomy=SimpleNamespace(model=layer), state=SimpleNamespace(global_step=0), say=print,
        is_deepspeed_enabled=False, is_fsdp_enabled=False,
    )  # fmt: skip
    method.setup(stand_in)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    for step in range(1, 301):
        stand_in.state.global_step = step
        method.after_update(stand_in)
    assert method.average["weight"].dtype == torch.float32
    expected = torch.full((4, 4), 2 - 0.999**300)
    torch.testing.assert_close(method.average["weight"], expected, rtol=1e-5, atol=0)
    method.finish(stand_in)
    assert torch.equal(layer.weight, expected.bfloat16())


@pytest.mark.parametrize("theta", ["full", "lora"])
def test_resume_ends_where_the_whole_run_ends(tmp_path, theta):
    options = dict(theta=theta, dtype=torch.float32, max_steps=4, save_strategy="steps", save_steps=2)
    whole = tiny_trainer("ema", tmp_path / "whole", **options)
    whole.train()
    resumed = tiny_trainer("ema", tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, one), (_, two) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        assert torch.equal(one, two), name


def test_a_checkpoint_holds_the_trained_weights_and_the_average_beside_them(tmp_path):
    t = tiny_trainer("ema", tmp_path, dtype=torch.float32, max_steps=2, save_strategy="steps", save_steps=2)
    path = Trajectory(t)
    t.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    kept = dict(t.model.named_parameters())
    for name, last in path.seen[-1].items():
        assert torch.equal(saved[name], last.cpu())
        assert not torch.equal(kept[name], last)


@pytest.mark.parametrize(("options", "message"), [
    ({"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}, "load_best_model_at_end"),
    ({"method_args": "decay=1,warmup=false"}, "keeps the untouched model"),
    ({"method_args": "decay=1.5"}, "ema.decay must be"),
])  # fmt: skip
def test_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer("ema", tmp_path, **options)


@pytest.mark.parametrize("method", ["ema", "l2sp"])
def test_prompt_tuning_trains_no_weight(tmp_path, method):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="no weight of the model is trained"):
        tiny_trainer(method, tmp_path, model=small_model(dtype=torch.float32), peft_config=config)


def test_another_runs_average_is_refused(tmp_path):
    t = tiny_trainer("ema", tmp_path)
    state = dict(list(t.methods[0].state_dict().items())[1:])
    with pytest.raises(ValueError, match="of other weights"):
        t.methods[0].load_state_dict(state)


def test_one_method_decides_which_weights_are_kept():
    with pytest.raises(ValueError, match="ema and wise can't be combined"):
        methods_of("ema+wise")
