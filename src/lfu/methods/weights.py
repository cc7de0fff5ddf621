"""Theta as methods on weights see it: plain parameters by name, and LoRA's pairs of factors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn

from lfu.model.anatomy import Anatomy
from lfu.model.precision import wide


@dataclass(frozen=True)
class Pair:
    """The two factors of one LoRA layer, whose weight is `W0 + scaling * B A`.

    Attributes:
        name: of the layer, in the causal language model.
        A: `(r, in)`.
        B: `(out, r)`.
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
        variant: `Dora` or another form in which the weight is more than `W0 + scaling * B A`; None for plain LoRA.
    """

    name: str
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    variant: str | None


def named_theta(anatomy: Anatomy) -> dict[str, nn.Parameter]:
    """The parameters being fine-tuned, by their names in the causal language model; tied ones once.

    Raises:
        ValueError: there are none, as in prompt tuning.
    """
    theta = {name: p for name, p in anatomy.model.named_parameters() if p.requires_grad}
    if not theta:
        raise ValueError("no weight of the model is trained, and this method works on weights: use LoRA or all weights")
    return theta


def lora_pairs(anatomy: Anatomy) -> list[Pair]:
    """The pairs of factors of which at least one is being fine-tuned.

    Raises:
        ValueError: a LoRA on a bare parameter (PEFT's `target_parameters`), whose product has another layout.
    """
    pairs = []
    for name, layer in anatomy.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for adapter in layer.active_adapters:
            factors = _factors(layer, adapter)
            if factors is None or not any(factor.requires_grad for factor in factors):
                continue
            if isinstance(layer, ParamWrapper):
                raise ValueError(f"{name}: LoRA on a bare parameter (target_parameters) is not known to this method")
            pairs.append(Pair(name, *factors, layer.scaling[adapter], _variant(layer.lora_variant.get(adapter))))
    return pairs


def plain_theta(anatomy: Anatomy, pairs: list[Pair]) -> dict[str, nn.Parameter]:
    """Theta without the factors of `pairs`: full weights, biases, `modules_to_save`, DoRA's magnitudes."""
    factors = {id(factor) for pair in pairs for factor in (pair.A, pair.B)}
    return {name: p for name, p in named_theta(anatomy).items() if id(p) not in factors}


def product_norm2(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`||left right||_F^2` of `(m, k)` and `(k, n)`, by two k x k products; a scalar in float32 or wider."""
    left, right = wide(left), wide(right)
    with torch.autocast(left.device.type, enabled=False):  # it would multiply in half precision
        return ((left.T @ left) * (right @ right.T)).sum()


def refuse_sharding(trainer: Any, name: str) -> None:
    """Raises ValueError under FSDP and DeepSpeed, where no process holds a whole weight."""
    _refuse_where(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled, name)


def refuse_sharded_launch(args: Any, name: str) -> None:
    """The same before there is a trainer, by what the launcher has set."""
    fsdp = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
    _refuse_where(fsdp or args.deepspeed_plugin is not None, name)


def _refuse_where(sharded: bool, name: str) -> None:
    if sharded:
        raise ValueError(f"method {name!r} reads whole weights, and FSDP and DeepSpeed cut them up: use DDP or one GPU")


def _factors(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return None


def _variant(variant: Any) -> str | None:
    if variant is None:
        return None
    name = (variant if isinstance(variant, type) else type(variant)).__name__
    return name.removesuffix("Variant").removesuffix("Linear").removesuffix("Embedding")
