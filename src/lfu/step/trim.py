"""The batch of the second pass, without what cannot matter: padding, and all that comes after the last compared token.

A causal model's state at a token depends on what stands before it alone, so the compared states, and every gradient
through them, are the same numbers. The first pass stays as the user's loss wants it.
"""

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
    row, column = where.cpu() // shape[1], where.cpu() % shape[1]
    if not real[row, column].all():
        return inputs, where
    rows, spot = row.unique(return_inverse=True)
    ends = torch.zeros(len(rows), dtype=torch.long).scatter_reduce_(0, spot, column + 1, "amax").tolist()
    starts = real[rows].long().argmax(1).tolist()
    if _packs(inputs, anatomy, real[rows], starts, ends):
        packed, offsets = _pack(inputs, rows, ends)
        return packed, (offsets[spot] + column).to(where.device)
    numbered = "position_ids" in inputs or anatomy.model.config.get_text_config().model_type in PACKS
    low, high = min(starts) if numbered else 0, max(ends)  # others may number their tokens by the mask
    return _cut(inputs, rows, low, high), (spot * (high - low) + column - low).to(where.device)


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


def _pack(inputs: Batch, rows: torch.Tensor, ends: list[int]) -> tuple[dict[str, Any], torch.Tensor]:
    """All rows behind one another, `(1, sum of lengths)`, told apart by position_ids; and where each begins."""
    width, device = inputs["input_ids"].shape[1], inputs["input_ids"].device
    flat = torch.cat([row * width + torch.arange(end) for row, end in zip(rows.tolist(), ends)]).to(device)
    others = {name: value for name, value in inputs.items() if name != "attention_mask"}
    packed = {n: value.flatten()[flat][None] if n in _PER_TOKEN else value for n, value in others.items()}
    return packed | {"position_ids": (flat % width)[None]}, torch.tensor([0, *ends]).cumsum(0)


def _cut(inputs: Batch, rows: torch.Tensor, low: int, high: int) -> dict[str, Any]:
    """These rows from the column `low`, the first that is not padding in all of them, to before `high`."""
    chosen = rows.to(inputs["input_ids"].device)
    cut = {n: value[chosen, low:high] if n in _PER_TOKEN else value for n, value in inputs.items()}
    if low > 0 and "position_ids" not in inputs:
        cut["position_ids"] = torch.arange(low, high, device=chosen.device).expand(len(rows), -1)
    return cut
