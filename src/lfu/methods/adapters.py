"""What the methods that replace the LoRA adapter by another one of PEFT's have in common."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel

# What a LoRA config can ask for and the other adapters have no counterpart of.
LORA_ONLY = (
    "modules_to_save", "exclude_modules", "layers_to_transform", "target_parameters", "rank_pattern",
    "trainable_token_indices", "use_dora",
)  # fmt: skip


def refuse_what_is_no_lora(method: str, config: Any, model: Any) -> None:
    """Raises ValueError unless a plain LoRA config for a bare model is there to take the place of."""
    if isinstance(model, PeftModel):
        raise ValueError(
            f"method {method!r} is an adapter, and the model is an adapter already: merge it first (lfu export)"
        )
    if config is None:
        raise ValueError(
            f"method {method!r} is an adapter: train one (--use_peft true, or peft_config=LoraConfig(...))"
        )
    if not isinstance(config, LoraConfig):
        raise ValueError(f"method {method!r} takes the place of a LoRA adapter, got {type(config).__name__}")
    for field in LORA_ONLY:
        if getattr(config, field, None):
            raise ValueError(f"method {method!r}: PEFT's {method.upper()} has no {field}: drop it")
