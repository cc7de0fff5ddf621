"""Rows longer than training takes, or than the model was made for: counted, and said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lfu.data.templates import count_too_long

if TYPE_CHECKING:
    from datasets import Dataset

    from lfu.support.annotations import Tokenizer


def about_lengths(
    rows: Dataset, what: str, tokenizer: Tokenizer, *, max_length: int | None, context: int | None
) -> Iterator[str]:
    """What is odd about the lengths of rows, in sentences without their full stop.

    Args:
        rows: of `to_training_rows`.
        what: what they are called, such as "evaluation rows".
        tokenizer: the model's.
        max_length: tokens at which they are cut; None: nowhere.
        context: tokens that the model was made for; None: any number.
    """
    if cut := count_too_long(rows, tokenizer, max_length):
        yield f"{cut} of {len(rows)} {what} are longer than max_length {max_length} and are cut there"
    if context is None or (max_length is not None and max_length <= context):
        return
    if beyond := count_too_long(rows, tokenizer, context):
        yield (
            f"{beyond} of {len(rows)} {what} are longer than the {context} tokens that the model was made for; "
            f"--max_length {context} cuts training rows there"
        )
