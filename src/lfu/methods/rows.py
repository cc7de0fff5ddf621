"""What shape training rows have, for the methods that read or change them before the trainer does."""

import json
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from lfu.support.errors import UserError

SHAPES = {"prompt": ("prompt", "completion"), "messages": ("messages",)}
Row = dict[str, Any]
Message = dict[str, Any]


def shape_of(rows: Any, method: str, text_field: str = "text") -> str:
    """`prompt` (prompt and completion), `messages` or `text` (the column `text_field`): the training rows' shape.

    Raises ValueError: a streamed data set; UserError: rows that are tokenised, hold pictures, or have no such shape.
    """
    if not isinstance(rows, Dataset):
        raise ValueError(f"method {method!r} needs all training rows at hand: load them without streaming")
    columns = set(rows.column_names)
    if "input_ids" in columns:
        raise UserError(
            f"method {method!r} works on texts, and these training rows are tokenised already (input_ids): "
            "give prompt and completion, or messages"
        )
    if columns & {"image", "images"}:
        raise UserError(f"method {method!r} works on texts, and these training rows hold images")
    for shape, needed in (*SHAPES.items(), ("text", (text_field,))):
        if columns.issuperset(needed):
            return shape
    raise UserError(
        f"method {method!r}: training rows with the columns {', '.join(rows.column_names)} are in none of TRL's "
        f"shapes: give prompt and completion, messages, or {text_field}"
    )


def messages_of(row: Mapping[str, Any]) -> list[Message] | None:
    """The row's messages; None for a row of texts."""
    if "messages" in row:
        return row["messages"]
    return row["prompt"] + row["completion"] if isinstance(row.get("prompt"), list) else None


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the chat template gets beside a row's messages, as TRL passes it: tools, and `chat_template_kwargs`."""
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}
