"""Where the LoRA auxiliary attaches."""

from __future__ import annotations

import warnings

import pytest
from peft import LoraConfig, get_peft_model
from tiny import DEVICE, tiny_batch, tiny_model

from lfu import LfUStep


@pytest.mark.parametrize("saved", ["down_proj", "mlp"])
def test_of_a_module_that_peft_copies_the_copy_alone_has_a_pair(saved):
    """`modules_to_save`: the original stays in the tree and is never called."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[saved])
    model = get_peft_model(tiny_model("llama"), config, autocast_adapter_dtype=False).double().to(DEVICE)
    step = LfUStep(model)
    assert len(step.auxiliary.sites) == 4 * 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step(tiny_batch()).skipped is None


def test_of_fused_experts_that_peft_copies_the_copy_alone_has_pairs():
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"])
    model = get_peft_model(tiny_model("mixtral"), config, autocast_adapter_dtype=False).double().to(DEVICE)
    step = LfUStep(model)
    assert len(step.auxiliary.experts) == 4 * 2
    assert step(tiny_batch()).skipped is None
