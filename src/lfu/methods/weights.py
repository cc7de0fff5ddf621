"""Theta as methods on weights see it: plain parameters by name, and LoRA's pairs of factors."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftType
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn

from lfu.model.anatomy import Anatomy
from lfu.model.precision import wide


class Pair(NamedTuple):
    """The two factors of one LoRA layer, whose weight is `W0 + scaling * B A`."""

    name: str  # of the layer, in the causal language model
    A: torch.Tensor  # (r, in)
    B: torch.Tensor  # (out, r)
    scaling: float  # alpha / r, or alpha / sqrt(r) with rsLoRA
    variant: str | None  # `Dora` or another form in which the weight is more than `W0 + scaling * B A`


def named_theta(anatomy: Anatomy) -> dict[str, nn.Parameter]:
    """The parameters being fine-tuned, by their names in the causal language model; tied ones once.

    Raises ValueError: there are none, as in prompt tuning.
    """
    theta = {name: p for name, p in anatomy.model.named_parameters() if p.requires_grad}
    if not theta:
        raise ValueError("no weight of the model is trained, and this method works on weights: use LoRA or all weights")
    return theta


def lora_pairs(anatomy: Anatomy) -> list[Pair]:
    """The pairs of factors of which at least one is being fine-tuned.

    Raises ValueError: a LoRA on a bare parameter (PEFT's `target_parameters`), whose product has another layout.
    """
    pairs = []
    for name, layer in anatomy.model.named_modules():
        for adapter in layer.active_adapters if isinstance(layer, LoraLayer) else ():
            factors = factors_of(layer, adapter)
            if not any(factor.requires_grad for factor in factors):
                continue
            if isinstance(layer, ParamWrapper):
                raise ValueError(f"{name}: LoRA on a bare parameter (target_parameters) is not known to this method")
            variant = layer.lora_variant.get(adapter)
            kind = variant if isinstance(variant, type) else type(variant)
            word = None if variant is None else re.sub("(Linear|Embedding)?Variant$", "", kind.__name__)
            pairs.append(Pair(name, factors[0], factors[1], layer.scaling[adapter], word))
    return pairs


def form_of(config: PeftConfig | None) -> str | None:
    """What a PEFT config stands for if it is neither plain LoRA nor no adapter, as `Pair.variant` calls it."""
    if config is None or config.peft_type == PeftType.LORA:
        return "Dora" if getattr(config, "use_dora", False) else None
    return f"a {config.peft_type.value} adapter"


def factors_of(layer: Any, adapter: str) -> tuple[torch.Tensor, ...]:
    """A and B of a LoRA layer; nothing where it has no such adapter."""
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return ()


def plain_theta(anatomy: Anatomy, pairs: list[Pair]) -> dict[str, nn.Parameter]:
    """Theta without the factors of `pairs`: full weights, biases, `modules_to_save`, DoRA's magnitudes."""
    factors = {id(factor) for pair in pairs for factor in (pair.A, pair.B)}
    return {name: p for name, p in named_theta(anatomy).items() if id(p) not in factors}


def product_norm2(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`||left right||_F^2` of `(m, k)` and `(k, n)`, by two k x k products; a scalar in float32 or wider."""
    left, right = wide(left), wide(right)
    with torch.autocast(left.device.type, enabled=False):  # it would multiply in half precision
        return ((left.T @ left) * (right @ right.T)).sum()


def take_back(state: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor], what: str) -> None:
    """Copies what a checkpoint holds, called `what` in the message, into the tensors that have its names.

    Raises ValueError: they have others.
    """
    if state.keys() != into.keys():
        raise ValueError(f"the checkpoint's {what} is of other weights: resume with the run's own settings")
    for name, value in state.items():
        into[name].copy_(value.detach())
