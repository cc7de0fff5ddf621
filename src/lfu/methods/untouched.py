"""The model as it was before fine-tuning, without a second model in memory where that can be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.func import functional_call

from lfu.evaluation.batching import evaluating
from lfu.model.anatomy import Anatomy
from lfu.model.representations import Reader


class Untouched:
    """Hidden states and logits of the untouched model, on the same tokens, without gradients and dropout.

    With a fresh LoRA or DoRA theta it is the model with the adapter switched off: no copy of anything. Otherwise
    (full theta, an adapter trained further, an initialisation that changes the base) a copy of theta alone is kept.

    Args:
        model: as it starts; a `PeftModel` or the bare model.
        anatomy: its parts.
        copied: keep a copy of theta in any case, so that the owner may write newer weights into `start`.
    """

    def __init__(self, model: Any, anatomy: Anatomy, copied: bool = False):
        self.model, self.anatomy = model, anatomy
        self.adapter_off = not copied and _is_fresh_adapter(model)
        theta = [] if self.adapter_off else anatomy.theta()
        self.start = {id(p): p.detach().clone() for p in theta}

    def hidden(self, inputs: Mapping[str, Any], positions: torch.Tensor, layers: list[int]) -> dict[int, torch.Tensor]:
        """Layer (1..K, K after the final norm) -> `(N, d)` at the flat `positions` `(N,)`."""
        reader = Reader(self.anatomy, layers)
        decoder = self.anatomy.decoder
        untouched = lambda **given: functional_call(decoder, self._start_of(decoder), (), given)
        with (
            torch.no_grad(),
            evaluating(self.model),
            self._switched_off(),
            reader.reading(positions, detach=True, stop=True) as found,
        ):
            reader.run(inputs, call=untouched)
        return found

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Its head: `(N, d) -> (N, V)`."""
        head = self.anatomy.model.get_output_embeddings()
        return self.anatomy.logits(hidden, head=lambda h: functional_call(head, self._start_of(head), (h,)))

    def _start_of(self, module: nn.Module) -> dict[str, torch.Tensor]:
        return {name: self.start[id(p)] for name, p in module.named_parameters() if id(p) in self.start}

    @contextmanager
    def _switched_off(self) -> Iterator[None]:
        flags = [(p, p.requires_grad) for p in self.model.parameters()] if self.adapter_off else []
        try:
            with self.model.disable_adapter() if self.adapter_off else nullcontext():
                yield
        finally:
            for p, flag in flags:  # PEFT switches all of the adapter's on again, frozen ones too
                p.requires_grad_(flag)


def _is_fresh_adapter(model: Any) -> bool:
    """Whether all of theta is a LoRA (or copies of whole modules) that changes nothing yet."""
    if not hasattr(model, "disable_adapter"):
        return False
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if not all("lora_" in name or "modules_to_save" in name for name in trained):
        return False
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    named = [pair for layer in layers for pair in layer.named_parameters()]
    return bool(layers) and all(not p.any() for name, p in named if "lora_B" in name or "embedding_B" in name)
