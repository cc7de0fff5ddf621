"""A Llama in plain PyTorch whose weights have a leading dimension of runs: many models go forward at once.

Names, shapes and arithmetic are those of transformers' `LlamaForCausalLM` with tied embeddings. Rows are padded on the
right, which causal attention needs no mask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]
HEAD = 32  # width of an attention head
EPS, THETA = 1e-6, 10_000.0
EMBEDDING, FINAL = "model.embed_tokens.weight", "model.norm.weight"


@dataclass(frozen=True)
class Shape:
    """How large the model is; the default has 1.07 million weights."""

    vocabulary: int
    width: int = 128
    inner: int = 384
    layers: int = 5

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, without the leading dimension of runs."""
        d, m = self.width, self.inner
        found: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocabulary, d)}
        for layer in range(self.layers):
            block = f"model.layers.{layer}."
            found |= {f"{block}self_attn.{n}_proj.weight": (d, d) for n in "qkvo"}
            found |= {f"{block}mlp.{n}_proj.weight": (m, d) for n in ("gate", "up")}
            found |= {f"{block}mlp.down_proj.weight": (d, m)}
            found |= {f"{block}{n}_layernorm.weight": (d,) for n in ("input", "post_attention")}
        return found | {FINAL: (d,)}


def is_linear(name: str) -> bool:
    """Whether the weight is a linear layer of a block: where LoRA goes."""
    return name.endswith("_proj.weight")


def fresh(shape: Shape, seeds: Sequence[int]) -> Weights:
    """Random weights of one model a seed, `(runs, ...)` float32, drawn as transformers does: N(0, 0.02), norms 1."""
    models = []
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        models.append({
            name: torch.ones(size) if len(size) == 1 else torch.randn(size, generator=draw) * 0.02
            for name, size in shape.weights().items()
        })  # fmt: skip
    return {name: torch.stack([model[name] for model in models]) for name in shape.weights()}


def hidden_states(weights: Weights, ids: torch.Tensor, steering: Sequence[torch.Tensor] | None = None) -> list:
    """h after each layer, the last one normed: a list of `(S, B, T, d)`.

    Args:
        weights: `(S, ...)` each.
        ids: `(S, B, T)`.
        steering: a vector `(S, d)` a layer, added to the block's output at every token and carried forward.
    """
    runs, rows, length = ids.shape
    embedding = weights[EMBEDDING]
    vocabulary, width = embedding.shape[1:]
    chosen = ids.reshape(runs, -1, 1) == torch.arange(vocabulary, device=ids.device)
    x = torch.bmm(chosen.to(embedding.dtype), embedding)  # (S, B T, d); of few tokens a product is the fastest lookup
    cos, sin = _rotation(length, x)
    found: list[torch.Tensor] = []
    for block in _blocks(weights):
        h = _norm(x, block["input_layernorm"])
        q, k, v = (
            torch.bmm(h, block[f"self_attn.{n}_proj"].transpose(1, 2))
            .view(runs * rows, length, -1, HEAD)
            .transpose(1, 2)
            for n in "qkv"
        )
        attended = F.scaled_dot_product_attention(_turned(q, cos, sin), _turned(k, cos, sin), v, is_causal=True)
        attended = attended.transpose(1, 2).reshape(runs, rows * length, width)
        x = x + torch.bmm(attended, block["self_attn.o_proj"].transpose(1, 2))
        h = _norm(x, block["post_attention_layernorm"])
        gate, up = (torch.bmm(h, block[f"mlp.{n}_proj"].transpose(1, 2)) for n in ("gate", "up"))
        x = x + torch.bmm(F.silu(gate) * up, block["mlp.down_proj"].transpose(1, 2))
        if steering is not None:
            x = x + steering[len(found)][:, None]
        found.append(x.view(runs, rows, length, width))
    found[-1] = _norm(x, weights[FINAL]).view(runs, rows, length, width)
    return found


def logits(weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
    """`(S, ..., d) -> (S, ..., V)`, by the tied embeddings."""
    flat = torch.bmm(hidden.flatten(1, -2), weights[EMBEDDING].transpose(1, 2))
    return flat.view(*hidden.shape[:-1], -1)


def _blocks(weights: Weights) -> list[dict[str, torch.Tensor]]:
    blocks: dict[int, dict[str, torch.Tensor]] = {}
    for name, weight in weights.items():
        if name.startswith("model.layers."):
            _, _, layer, inner = name.split(".", 3)
            blocks.setdefault(int(layer), {})[inner.removesuffix(".weight")] = weight
    return [blocks[layer] for layer in sorted(blocks)]


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS) * weight[:, None]


def _rotation(length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary positions, `(T, HEAD)`."""
    inverse = 1.0 / THETA ** (torch.arange(0, HEAD, 2, device=like.device, dtype=torch.float32) / HEAD)
    angles = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * inverse
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin
