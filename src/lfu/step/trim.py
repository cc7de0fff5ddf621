"""The batch of the second pass, without what cannot matter: padding, and all that comes after the last compared token.

A causal model's state at a token depends on what stands before it alone, so the compared states, and every gradient
through them, are the same numbers. The first pass stays as the user's loss wants it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from lfu.model.anatomy import Anatomy, whole_shape
from lfu.model.representations import LOSS_ONLY

Batch = Mapping[str, Any]
# entries of `(B, T)` that are cut along with the tokens
_PER_TOKEN = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
# Families whose tokens are numbered 0..T-1 whatever the mask says, and whose attention takes a row of several
# sequences, told apart by position_ids, as TRL's padding-free does; each tried in tests/step/test_trim.py.
PACKS = {
    "cohere", "gemma", "gemma2", "gemma3_text", "glm", "gpt2", "granite", "llama", "mistral", "mixtral", "olmo",
    "olmo2", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
}  # fmt: skip
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
# packing must save this share of the arithmetic: gathering rows and a mask of its own cost something
_WORTH = 0.9


def trimmed(batch: Batch, where: torch.Tensor, anatomy: Anatomy) -> tuple[dict[str, Any], torch.Tensor]:
    """The decoder's inputs for the second pass, and where the compared tokens are in them.

    Rows without a compared token go, and the columns after the last one. Then either the rows become one sequence
    without any padding (right-padded rows of a family in `PACKS`, where it saves arithmetic), or columns that are
    padding in every row go too.

    Args:
        batch: `input_ids` `(B, T)`, ...; what is cut along: `attention_mask`, `position_ids`, `token_type_ids`.
        where: `(N,)`, flat indices into B*T, ascending.
        anatomy: the model's parts; its config says what is safe.

    Returns:
        inputs `(B', T')` and `(N,)` flat indices into B'*T', in the same order. What can't be cut safely comes back as
        it is: another tensor in the batch (the bounds in a row that TRL has packed, which has no padding), a compared
        token that is masked, a rope that depends on the length, a model that is not causal or whose adapter goes by
        what is in the batch (aLoRA).
    """
    inputs = {name: value for name, value in batch.items() if name not in LOSS_ONLY}
    if not len(where) or not _plain(inputs, anatomy):
        return inputs, where
    shape = inputs["input_ids"].shape
    mask = inputs.get("attention_mask")
    real = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
    places = where.cpu()
    row, column = places // shape[1], places % shape[1]
    if not real[row, column].all():
        return inputs, where
    rows, spot = row.unique(return_inverse=True)
    ends = torch.zeros(len(rows), dtype=torch.long).scatter_reduce_(0, spot, column + 1, "amax").tolist()
    starts = real[rows].long().argmax(1).tolist()
    if _packs(inputs, anatomy, real[rows], starts, ends):
        return _pack(inputs, rows, ends, spot, column, where.device)
    return _cut(inputs, anatomy, rows, min(starts), max(ends), spot, column, where.device)


def _plain(inputs: Batch, anatomy: Anatomy) -> bool:
    config = anatomy.model.config.get_text_config()
    rope = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    if anatomy.wrapper is not None or not getattr(config, "is_causal", True) or re.search("dynamic|longrope", rope):
        return False
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        return False
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
    return all(name in _PER_TOKEN and value.shape == ids.shape for name, value in tensors.items())


def _packs(inputs: Batch, anatomy: Anatomy, real: torch.Tensor, starts: list[int], ends: list[int]) -> bool:
    """Whether one sequence without padding is safe and saves arithmetic over the rows cut to the longest."""
    config = anatomy.model.config.get_text_config()
    attention = getattr(config, "_attn_implementation", None)
    if len(ends) == 1 or "position_ids" in inputs or max(starts) > 0:
        return False
    if config.model_type not in PACKS or attention not in _ATTENTION:
        return False
    if not all(line[:end].all() for line, end in zip(real, ends)):  # holes in the mask
        return False
    weights = sum(whole_shape(p).numel() for p in anatomy.blocks[0].parameters())
    tokens, width = sum(ends), config.hidden_size
    # multiply-adds of one block: its weights for every token, and 2 * width for every pair that attention forms
    padded = len(ends) * max(ends) * (weights + 2 * width * max(ends))
    pairs = sum(end * end for end in ends) if attention.startswith("flash") else tokens * tokens
    return tokens * weights + 2 * width * pairs < _WORTH * padded


def _pack(
    inputs: Batch, rows: torch.Tensor, ends: list[int], spot: torch.Tensor, column: torch.Tensor, device: torch.device
) -> tuple[dict[str, Any], torch.Tensor]:
    """All rows behind one another, `(1, sum of lengths)`, told apart by position_ids."""
    width = inputs["input_ids"].shape[1]
    flat = torch.cat([row * width + torch.arange(end) for row, end in zip(rows.tolist(), ends)]).to(device)
    packed = {}
    for name, value in inputs.items():
        if name in _PER_TOKEN and name != "attention_mask":
            packed[name] = value.flatten()[flat][None]
        elif name != "attention_mask":
            packed[name] = value
    packed["position_ids"] = (flat % width)[None]
    offsets = torch.tensor([0, *ends]).cumsum(0)
    return packed, (offsets[spot] + column).to(device)


def _cut(
    inputs: Batch,
    anatomy: Anatomy,
    rows: torch.Tensor,
    low: int,
    high: int,
    spot: torch.Tensor,
    column: torch.Tensor,
    device: torch.device,
) -> tuple[dict[str, Any], torch.Tensor]:
    """The rows with a compared token, from the first column that is not padding in all of them to the last needed."""
    if "position_ids" not in inputs and anatomy.model.config.get_text_config().model_type not in PACKS:
        low = 0  # this family may number its tokens by the mask
    chosen = rows.to(device)
    cut = {
        name: value.index_select(0, chosen)[:, low:high] if name in _PER_TOKEN else value
        for name, value in inputs.items()
    }
    if low > 0 and "position_ids" not in inputs:
        cut["position_ids"] = torch.arange(low, high, device=device).expand(len(rows), -1)
    return cut, (spot * (high - low) + column - low).to(device)
