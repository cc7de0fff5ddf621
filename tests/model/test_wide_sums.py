"""Sums in the widest dtype that a device has: Apple's GPUs have no float64."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_trainer import DATA, tokenizer
from tiny import tiny_batch, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lfu import LfUConfig, LfUStep, LfUTrainer
from lfu.model import tensors
from lfu.model.precision import widest
from lfu.step import second_pass


class WithoutFloat64(TorchDispatchMode):
    """A device that has no float64, as Apple's GPUs are: an operation that gives some is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        wide = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor) and t.dtype == torch.float64]
        if wide:
            raise TypeError(f"{func} gives float64, which this device does not have")
        return found


@pytest.fixture
def apple(monkeypatch):
    """Everything is as on Apple's GPU, but for the device itself."""
    for module in (tensors, second_pass):
        monkeypatch.setattr(module, "widest", lambda device: widest(torch.device("mps")))


def test_what_is_widest_where():
    assert widest(torch.device("mps")) == torch.float32
    assert widest(torch.device("cpu")) == widest(torch.device("cuda")) == torch.float64


@pytest.mark.parametrize("auxiliary", ["lora", "steering", "own"])
@pytest.mark.parametrize("consistency", ["mse", "logit_kl"])
def test_a_step_needs_no_float64(apple, auxiliary, consistency):
    model = tiny_model(theta="lora", dtype=torch.float32)
    step = LfUStep(model, lam="auto", auxiliary=auxiliary, consistency=consistency)
    with WithoutFloat64():
        records = [step(tiny_batch(seed)) for seed in range(2)]
    assert all(record.skipped is None and record.gradient_ratio > 0 for record in records)


@pytest.mark.parametrize("method", ["sft", "lfu"])
def test_a_training_needs_no_float64(apple, method, tmp_path):
    args = LfUConfig(
        str(tmp_path), method=method, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=1,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = LfUTrainer(
        tiny_model(dtype=torch.float32), args, train_dataset=Dataset.from_list(DATA["prompt_completion"]),
        processing_class=tokenizer(), peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip
    with WithoutFloat64():
        assert trainer.train().training_loss > 0


def test_the_norm_and_the_product_are_the_same_numbers_without_float64(monkeypatch):
    parts = [torch.randn(50, 30), torch.randn(7)]
    exact = tensors.global_norm(parts), float(tensors.dot(parts, [*parts[:1], torch.ones(7)]))
    monkeypatch.setattr(tensors, "widest", lambda device: torch.float32)
    narrow = tensors.global_norm(parts), float(tensors.dot(parts, [*parts[:1], torch.ones(7)]))
    assert narrow == pytest.approx(exact, rel=1e-5)
