"""What the public functions take, for type checkers and readers. Nothing is imported at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TypeAlias

    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Model: TypeAlias = PreTrainedModel | PeftModel
    Tokenizer: TypeAlias = PreTrainedTokenizerBase
