"""To look at a model in the middle of its training and leave no trace."""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from lfu.evaluation.batching import adapter_off, evaluating, generators_kept

# Ways to start an adapter that rewrite the base weights: with the adapter off it isn't the untouched model
_REWRITE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "orthogonal")


@contextmanager
def unnoticed(model: Any) -> Iterator[None]:
    """Eval mode without gradients; afterwards train flags and all random generators are as before."""
    environment = mock.patch.dict(os.environ, {"UNSLOTH_RETURN_LOGITS": "1"} if unsloth() else {})
    with environment, generators_kept(model), evaluating(model), torch.no_grad():
        yield


def unsloth() -> bool:
    """Whether Unsloth has patched the models: their forward takes a key-value cache one token at a time only."""
    return "unsloth" in sys.modules


def untouched(model: Any) -> AbstractContextManager[None]:
    """The model before fine-tuning: its adapter switched off; a model trained in all its weights as it is."""
    return adapter_off(model) if has_untouched_base(model) else nullcontext()


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
