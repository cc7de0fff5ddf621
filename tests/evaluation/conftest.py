"""Tokenizers and questions small enough to score by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model
from tiny_folder import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

QUESTIONS = [
    {"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"},
    {"question": "Ann has 1,200 nuts and eats 7. How many are left?", "answer": "1200 - 7 = 1193\n#### 1,193"},
    {"question": "Half of 9?", "answer": "9 / 2 = 4.5\n#### 4.5"},
    {"question": "And 3 x 4, then?", "answer": "#### 12"},
    {"question": "Zero?", "answer": "It is none.\n#### 0"},
]
CHOICES = [
    {"question": "Which is wet?", "choices": ["a stone", "water", "dry sand", "a"], "answer": 1},
    {"question": "Which one of these animals can fly?", "choices": ["cow", "wren", "ant eater"], "answer": 1},
    {"question": "Up?", "choices": ["x", "y", "z", "w"], "answer": 0},
    {"question": "Colour of snow", "choices": ["white", "black", "white as milk", "red"], "answer": 0},
]
TEXTS = ["A short text.", "A somewhat longer text, with a second half to it; and a third.", "Hm", "No, 12 of them!"]


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
