"""To look at a model in the middle of its training and leave no trace."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from lfu.evaluation.batching import evaluating, generators_kept

# Ways to start an adapter that rewrite the base weights: with the adapter off it isn't the untouched model
_REWRITE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "orthogonal")


@contextmanager
def unnoticed(model: Any) -> Iterator[None]:
    """Eval mode without gradients; afterwards train flags, `requires_grad` and all random generators are as before."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    environment = mock.patch.dict(os.environ, {"UNSLOTH_RETURN_LOGITS": "1"} if unsloth() else {})
    try:
        with environment, generators_kept(model), evaluating(model), torch.no_grad():
            yield
    finally:
        for p, flag in wanted:  # PEFT switches all of an adapter's on when it is enabled again, frozen ones too
            p.requires_grad_(flag)


def unsloth() -> bool:
    """Whether Unsloth has patched the models: their forward takes a key-value cache one token at a time only."""
    return "unsloth" in sys.modules


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """The model before fine-tuning: its adapter switched off; a model trained in all its weights as it is."""
    if not has_untouched_base(model):
        yield
        return
    with model.disable_adapter():
        yield


def has_untouched_base(model: Any) -> bool:
    """Whether switching the adapter off gives the model before fine-tuning."""
    if not hasattr(model, "disable_adapter"):
        return False
    for config in getattr(model, "peft_config", {}).values():
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_REWRITE_BASE):
            return False
        if str(getattr(config, "peft_type", "")).endswith("OSF"):
            return False
    return True
