"""Attention within each row of a batch whose tokens are laid out as one sequence without padding.

The linear layers, nearly all of the arithmetic, then see real tokens alone. Attention sees the rows as they were, so
its kernel needs no mask: padding comes after a row's tokens, so that causal attention does not look at it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class PackedRows:
    """Where the N tokens of one sequence stand in the rows, each from its row's start: attention is causal."""

    places: torch.Tensor  # (N,), flat indices into `count * width`, ascending
    count: int  # rows
    width: int  # positions per row

    @classmethod
    def of(cls, lengths: torch.Tensor, device: torch.device) -> "PackedRows":
        """Of rows of these lengths, `(count,)`."""
        width = int(lengths.max())
        stands = torch.arange(width) < lengths[:, None]
        return cls(stands.flatten().nonzero().squeeze(1).to(device), len(lengths), width)

    def spread(self, states: torch.Tensor) -> torch.Tensor:
        """`(1, heads, N, d)` of queries, keys or values -> `(count, heads, width, d)`, with zeros where nothing is."""
        _, heads, _, size = states.shape
        empty = states.new_zeros(heads, self.count * self.width, size)
        rows = empty.index_copy(1, self.places.to(states.device), states[0])
        return rows.view(heads, self.count, self.width, size).transpose(0, 1)

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        """One of transformers' attention functions: `(1, N, heads, d)` of packed queries, keys and values."""
        window = options.get("sliding_window")
        seen = None
        if window is not None and window < self.width:
            seen = torch.ones(self.width, self.width, dtype=torch.bool, device=query.device).tril().triu(1 - window)
        output, _ = sdpa_attention_forward(module, *map(self.spread, (query, key, value)), seen, **options)
        return output.flatten(0, 1).index_select(0, self.places.to(output.device))[None], None


@contextmanager
def attention_in(rows: PackedRows | None, config: Any) -> Iterator[None]:
    """Within it, models of this text config, whose attention is `sdpa`, attend in these rows; None changes nothing.

    That is so in the forward and, with checkpointing, in the backward.
    """
    if rows is None:
        yield
        return
    usual, name = config._attn_implementation, f"rows {id(rows)}"
    ALL_ATTENTION_FUNCTIONS[name] = rows.attend
    config._attn_implementation = name  # a name without a mask of its own: transformers then makes none
    try:
        yield
    finally:
        config._attn_implementation = usual
        del ALL_ATTENTION_FUNCTIONS[name]
