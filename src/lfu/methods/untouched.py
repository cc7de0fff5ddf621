"""The model as it was before fine-tuning, without a second model in memory where that can be."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.func import functional_call

from lfu.evaluation.batching import adapter_off, evaluating
from lfu.methods.run import Batch
from lfu.model.anatomy import Anatomy
from lfu.model.representations import Reader


class Untouched:
    """Hidden states and logits of the untouched model, on the same tokens, without gradients and dropout.

    With a fresh LoRA or DoRA theta it is the model with the adapter switched off: no copy of anything. Otherwise
    (full theta, an adapter trained further, an initialisation that changes the base) a copy of theta alone is kept; if
    `copied` in any case, so that the owner may write newer weights into `start`.
    """

    def __init__(self, model: Any, anatomy: Anatomy, copied: bool = False):
        self.model, self.anatomy = model, anatomy
        self.adapter_off = not copied and _is_fresh_adapter(model)
        self.start = {} if self.adapter_off else {id(p): p.detach().clone() for p in anatomy.theta()}

    def last(self, batch: Batch) -> torch.Tensor:
        """`(N, d)`: what the head reads at the batch's positions."""
        depth = len(self.anatomy.blocks)
        return self.hidden(batch.inputs, batch.positions, [depth])[depth]

    @torch.no_grad()
    def hidden(self, inputs: Mapping[str, Any], positions: torch.Tensor, layers: list[int]) -> dict[int, torch.Tensor]:
        """Layer (1..K, K after the final norm) -> `(N, d)` at the flat `positions` `(N,)`."""
        reader, decoder = Reader(self.anatomy, layers), self.anatomy.decoder
        reading = reader.reading(positions, detach=True, stop=True)
        without = adapter_off(self.model) if self.adapter_off else nullcontext()
        with evaluating(self.model), without, reading as found:
            reader.run(inputs, call=lambda **given: functional_call(decoder, self._start_of(decoder), (), given))
        return found

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Its head: `(N, d) -> (N, V)`."""
        head = self.anatomy.model.get_output_embeddings()
        return self.anatomy.logits(hidden, head=lambda h: functional_call(head, self._start_of(head), (h,)))

    def _start_of(self, module: nn.Module) -> dict[str, torch.Tensor]:
        return {name: self.start[id(p)] for name, p in module.named_parameters() if id(p) in self.start}


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
