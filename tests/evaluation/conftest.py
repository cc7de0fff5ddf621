"""Tokenizers and questions small enough to score by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from questions import CHOICES
from tiny import tiny_model
from tiny_folder import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token a byte, with a chat template."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def merging_tokenizer() -> Any:
    """BPE without any split at white space: tokens merge over the seam between 'Answer:' and ' choice'."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    lines = [f"Question: {row['question']}\nAnswer: {choice}" for row in CHOICES for choice in row["choices"]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(lines * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(params=["llama", "gemma", "gpt2"])
def model(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    """Random float32 models (an eager attention mask overflows in float64).

    They stand for rotary positions, a sliding-window cache, and absolute positions with dropout.
    """
    more = {"attn_pdrop": 0.2, "n_positions": 256} if request.param == "gpt2" else {"max_position_embeddings": 256}
    return tiny_model(request.param, dtype=torch.float32, vocab_size=340, **more)


@pytest.fixture
def llama(tokenizer: Any) -> Any:
    return tiny_model("llama", dtype=torch.float32, vocab_size=340, max_position_embeddings=256)
