"""Rows that are longer than training takes or than the model was made for, or lose what is learned: counted."""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from pyarrow.compute import list_value_length

from lfu.support.errors import UserError


def lengths(rows: Dataset) -> list[int]:
    """How many tokens each of the tokenised rows has."""
    tables = rows.with_format("arrow").iter(1000)
    return [length for table in tables for length in list_value_length(table["input_ids"]).to_pylist()]


def about_lengths(rows: Dataset, what: str, *, max_length: int | None, context: int | None) -> Iterator[str]:
    """What is odd about the lengths of `tokenised` rows, called `what`, in sentences without their full stop.

    They are cut at `max_length` tokens, if any, and the model was made for `context`, if it says so.
    """
    found = lengths(rows)
    longer = lambda limit: sum(length > limit for length in found)
    if max_length is not None and (cut := longer(max_length)):
        yield f"{cut} of {len(rows)} {what} are longer than max_length {max_length} and are cut there"
    if context is not None and (max_length is None or max_length > context) and (beyond := longer(context)):
        yield (
            f"{beyond} of {len(rows)} {what} are longer than the {context} tokens that the model was made for; "
            f"--max_length {context} cuts training rows there"
        )


def about_cuts(rows: Dataset, what: str, args: Any, *, packed: bool, context: int | None = None) -> Iterator[str]:
    """`about_lengths` of rows to train on, and how many are `left_out`; arguments and errors as those have them."""
    out = left_out(rows, what, args, packed=packed)
    yield from about_lengths(rows, what, max_length=args.max_length, context=context)
    if out:
        yield f"{out} of {len(rows)} {what} are left out: max_length cuts off their whole answer"


def left_out(rows: Dataset, what: str, args: Any, *, packed: bool = False) -> int:
    """How many `tokenised` rows `max_length` leaves nothing to learn of, so that TRL drops them, or packs them in vain.

    Args:
        args: the `SFTConfig`: `max_length`, `truncation_mode` and `packing_strategy`.
        packed: whether they are packed; the strategy `bfd` then keeps the start of a row, the others keep all of it.

    Raises:
        UserError: no row would be left.
    """
    limit = args.max_length
    if limit is None or (packed and args.packing_strategy != "bfd") or "labels" not in rows.column_names:
        return 0  # TRL before 1.7 has masks in place of labels, and drops nothing
    from_start = packed or getattr(args, "truncation_mode", "keep_start") == "keep_start"  # TRL 0.24: always
    kept = slice(None, limit) if from_start else slice(-limit, None)
    found = lengths(rows)
    long = [row for row, length in enumerate(found) if length > limit]
    labels = [row["labels"] for row in rows.select(long)] if long else []
    out = sum(all(label == -100 for label in row[kept][1:]) for row in labels)  # nothing foretells the first token
    if out == len(rows):
        need = min(next(i for i, label in enumerate(row) if label != -100) + 2 for row in labels)
        raise UserError(
            f"no row is left of the {len(rows)} {what}: max_length {limit} cuts off every answer. The first answer "
            f"to be reached needs --max_length {need}; the longest row has {max(found)} tokens"
        )
    return out
