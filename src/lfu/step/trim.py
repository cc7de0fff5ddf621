"""The batch of the second pass, without what cannot matter: padding, and all that comes after the last compared token.

A causal model's state at a token depends on what stands before it alone, so the compared states, and every gradient
through them, are the same numbers. The first pass stays as the user's loss wants it.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from lfu.model.anatomy import Anatomy, whole_shape
from lfu.model.representations import LOSS_ONLY
from lfu.model.row_attention import PackedRows

Batch = Mapping[str, Any]
# entries of `(B, T)` that are cut along with the tokens
_PER_TOKEN = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
# Families whose tokens are numbered 0..T-1 whatever the mask says, and whose attention is transformers' own or takes a
# row of several sequences, told apart by position_ids; each tried in tests/step/test_trim.py.
PACKS = {
    "cohere", "gemma", "gemma2", "gemma3_text", "glm", "gpt2", "granite", "llama", "mistral", "mixtral", "olmo",
    "olmo2", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
}  # fmt: skip
# these tell the sequences of one row apart by position_ids; sdpa would need a mask that rules out its fast kernels
_BY_POSITION = ("eager", "flash_attention_2", "flash_attention_3")
# packing must save this share of the arithmetic: it copies queries, keys and values once
_WORTH = 0.95


class Trimmed(NamedTuple):
    """The second pass's inputs, `(N,)` flat indices of the compared tokens in them, and the rows to attend in."""

    batch: Batch
    where: torch.Tensor
    rows: PackedRows | None = None


def trimmed(batch: Batch, where: torch.Tensor, anatomy: Anatomy) -> Trimmed:
    """The decoder's inputs `(B', T')` for the second pass, and where the compared tokens are in them, in their order.

    Rows without a compared token go, and the columns after the last one. Then either the rows become one sequence
    without any padding (right-padded rows of a family in `PACKS`, where it saves arithmetic), or columns that are
    padding in every row go too.

    What can't be cut safely comes back as it is: another tensor in the batch (the bounds in a row that TRL has packed,
    which has no padding), a compared token that is masked, a rope that depends on the length, a model that is not
    causal or whose adapter goes by what is in the batch (aLoRA).
    """
    inputs = {name: value for name, value in batch.items() if name not in LOSS_ONLY}
    if not len(where) or not _plain(inputs, anatomy):
        return Trimmed(inputs, where)
    shape = inputs["input_ids"].shape
    mask = inputs.get("attention_mask")
    real = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
    row, column = where.cpu() // shape[1], where.cpu() % shape[1]
    if not real[row, column].all():
        return Trimmed(inputs, where)
    rows, spot = row.unique(return_inverse=True)
    ends = torch.zeros(len(rows), dtype=torch.long).scatter_reduce_(0, spot, column + 1, "amax")
    text = anatomy.model.config.get_text_config()
    numbered = "position_ids" in inputs or text.model_type in PACKS  # others may number their tokens by the mask
    low, high = int(real[rows].long().argmax(1).min()) if numbered else 0, int(ends.max())
    cut, there = _cut(inputs, rows, low, high), spot * (high - low) + column - low
    kept = real[rows, low:high] & (torch.arange(low, high) < ends[:, None])
    if "position_ids" not in inputs and _packs(anatomy, text, kept):
        return _pack(cut, there.to(where.device), kept, low, text)
    return Trimmed(cut, there.to(where.device))


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


def _packs(anatomy: Anatomy, text: Any, kept: torch.Tensor) -> bool:
    """Whether one sequence of the `kept` tokens `(B, T)` is safe and saves arithmetic over the rows."""
    lengths, (rows, width), attention = kept.sum(1), kept.shape, text._attn_implementation
    if rows == 1 or text.model_type not in PACKS or attention not in ("sdpa", *_BY_POSITION):
        return False
    first, column = kept.long().argmax(1, keepdim=True), torch.arange(width)
    if (kept != (column >= first) & (column < first + lengths[:, None])).any():
        return False  # a hole in a row
    if attention in _BY_POSITION and first.any():
        return False  # each row's positions must begin at 0
    weights = sum(whole_shape(p).numel() for p in anatomy.blocks[0].parameters())
    tokens, padded = int(lengths.sum()), rows * width * width
    pairs = {"sdpa": padded, "eager": tokens * tokens}.get(attention, int((lengths * lengths).sum()))
    # multiply-adds of one block: its weights for every token, and 2 * hidden_size for every pair that attention forms
    packed = tokens * weights + 2 * text.hidden_size * pairs
    return packed < _WORTH * (rows * width * weights + 2 * text.hidden_size * padded)


def _pack(cut: Batch, where: torch.Tensor, kept: torch.Tensor, low: int, text: Any) -> Trimmed:
    """The kept tokens of all rows behind one another, `(1, N)`, with the positions that they had."""
    places = kept.flatten().nonzero().squeeze(1).to(where.device)
    packed = {n: v.flatten()[places][None] if n in _PER_TOKEN else v for n, v in cut.items() if n != "attention_mask"}
    packed["position_ids"] = (low + places % kept.shape[1])[None]
    rows = PackedRows.of(kept.sum(1), where.device) if text._attn_implementation == "sdpa" else None
    return Trimmed(packed, torch.searchsorted(places, where), rows)


def _cut(inputs: Batch, rows: torch.Tensor, low: int, high: int) -> dict[str, Any]:
    """These rows from the column `low`, the first that is not padding in all of them, to before `high`."""
    chosen = rows.to(inputs["input_ids"].device)
    cut = {n: value[chosen, low:high] if n in _PER_TOKEN else value for n, value in inputs.items()}
    if low > 0 and "position_ids" not in inputs:
        cut["position_ids"] = torch.arange(low, high, device=chosen.device).expand(len(rows), -1)
    return cut
