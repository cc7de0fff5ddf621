"""A tiny random model with a byte-level tokenizer, saved as an ordinary folder: what the command line is tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(*, chat: bool = True) -> Any:
    """One token a byte, so that every text is known; with the special tokens of ChatML."""
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


AROUND = {  # what base models' tokenizers put round a text
    "Qwen": "$A", "Llama 3": "<|im_start|> $A", "GLM": "<|pad|> <|im_start|> $A",
    "with an end": "<|im_start|> $A <|im_end|>", "Llama 2": "<|im_start|> $A",
}  # fmt: skip


def base_tokenizer(kind: str) -> Any:
    """A base model's tokenizer, without a chat template: one of `AROUND`. Llama 2's puts a space before a text, too."""
    tokenizer = byte_tokenizer(chat=False)
    backend = tokenizer.backend_tokenizer
    if kind == "Llama 2":
        vocab = {**tokenizer.get_vocab(), "▁": len(tokenizer), "\n": len(tokenizer) + 1}
        model = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<|pad|>"))
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        model.decoder = decoders.Metaspace(prepend_scheme="first")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **tokenizer.special_tokens_map)
        backend = tokenizer.backend_tokenizer
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|pad|>", "<|im_start|>", "<|im_end|>")]
    backend.post_processor = processors.TemplateProcessing(single=AROUND[kind], special_tokens=special)
    if kind == "GLM":
        tokenizer.bos_token = None
    return tokenizer


def save_model(folder: Path, *, chat: bool = True, **sizes: int) -> str:
    """A random two-layer Llama and its tokenizer in `folder`; returns the folder as text."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(chat=chat)
    shape = dict(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**shape | sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
