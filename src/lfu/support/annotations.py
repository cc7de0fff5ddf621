"""What the public functions take, for type checkers and readers. Nothing is imported at run time."""

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Model: TypeAlias = PreTrainedModel | PeftModel
    Tokenizer: TypeAlias = PreTrainedTokenizerBase
else:
    Model = Tokenizer = Any
