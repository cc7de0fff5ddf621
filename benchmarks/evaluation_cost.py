"""What a measured token costs beside a bare forward pass, and a generated token beside a bare cached pass, in one run.

    python benchmarks/evaluation_cost.py

Each measure and its floor take turns, on the same model and items; the median of the ratios of neighbours counts. The
floor of a likelihood is the model's own forward pass over full batches of 8 x 128 tokens, with all logits, per token:
no padding, no tokenising, no loss. The floor of generation is the forward pass over one token of each of the same
prompts on the key-value cache, again and again, without choosing a token. Tokens are those that must be read: of
multiple choice each prompt once and each choice but for its last token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src")]

from lfu.data.probes import general_knowledge, plain_text  # noqa: E402
from lfu.data.word_problems import word_problems  # noqa: E402
from lfu.evaluation.batching import continuations, left_pad, pad_id  # noqa: E402
from lfu.evaluation.forgetting import choice_rows  # noqa: E402
from lfu.evaluation.pieces import answer_pieces, chat_pair, encode, text_pieces  # noqa: E402
from lfu.evaluation.record import machine, versions  # noqa: E402
from lfu.evaluation.score import _choice_ids, answer_nll, multiple_choice, perplexity  # noqa: E402
from lfu.model.loading import load_model  # noqa: E402

BATCH, LENGTH, NEW = 8, 128, 48


def seconds(work: Callable[[], Any]) -> float:
    # with one thread, processor time: other programs don't disturb it
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    return clock() - start


def bare_forward(model: Any) -> None:
    model(input_ids=torch.full((BATCH, LENGTH), 5), use_cache=False)


def bare_generation(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """The prompts, then NEW - 1 times one token of each."""
    cache = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1).past_key_values
    for _ in range(NEW - 1):
        mask = torch.cat([mask, mask[:, -1:]], 1)
        model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)


def likelihoods(model: Any, tokenizer: Any, items: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Measure -> (what runs it, tokens that must be read)."""
    rows, texts = word_problems("train", items), [row["text"] for row in plain_text()][:items]
    questions = choice_rows(general_knowledge())[: 4 * items]
    split = [_choice_ids(tokenizer, row) for row in questions]
    read = lambda pieces: sum(len(piece.ids) for piece in pieces)
    return {
        "loss on answers": (lambda: answer_nll(model, tokenizer, rows), read(answer_pieces(tokenizer, rows))),
        "loss on prose": (lambda: perplexity(model, tokenizer, texts), read(text_pieces(tokenizer, texts, start=1))),
        "multiple choice": (
            lambda: multiple_choice(model, tokenizer, questions),
            sum(len(prompt) + sum(len(choice) - 1 for choice in choices) for prompt, choices in split),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--items", type=int, default=16, help="rows and texts; four times as many questions")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    model, tokenizer = load_model(given.model)
    model.eval()
    print(f"{given.model}, {machine()}, {torch.get_num_threads()} thread(s), {versions()}")
    with torch.no_grad():
        for name, (work, tokens) in likelihoods(model, tokenizer, given.items).items():
            floor = lambda: bare_forward(model)
            report(name, tokens, work, BATCH * LENGTH, floor, given.rounds)
        prompts = [encode(tokenizer, chat_pair(tokenizer, row)[0]) for row in word_problems("train", BATCH)]
        ids, mask = left_pad(prompts, pad_id(tokenizer), model.device)
        tokenizer.eos_token_id = model.generation_config.eos_token_id = None  # all rows go on to the end
        generate = lambda: continuations(model, tokenizer, prompts, NEW, BATCH)
        report(
            "generation", BATCH * NEW, generate, BATCH * NEW, lambda: bare_generation(model, ids, mask), given.rounds
        )


def report(name: str, tokens: int, work: Any, floor_tokens: int, floor: Any, rounds: int) -> None:
    """Prints ms per token of both, and the ratio with its quartiles."""
    work(), floor()
    pairs = [(seconds(work) / tokens, seconds(floor) / floor_tokens) for _ in range(rounds)]
    ratios = [one / other for one, other in pairs]
    ours, theirs = (1000 * statistics.median(column) for column in zip(*pairs))
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"{name:16} {ours:7.2f} ms per token, floor {theirs:6.2f}: {middle:.2f} x ({low:.2f} to {high:.2f})", flush=True
    )


if __name__ == "__main__":
    main()
