"""What the untouched model writes when nobody asks it anything, and how sure it is of each token: kept on disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lfu.data.turns import MARK
from lfu.evaluation.batching import generate, pad_id, padded, with_logits
from lfu.evaluation.pieces import encode
from lfu.evaluation.record import weights_hash
from lfu.methods.run import Preparation
from lfu.methods.tokens import likeliest_tokens
from lfu.methods.writing import end_tokens, kept, key_of, length_of, ready_to_write
from lfu.model.rng import Replay

VERSION = 1  # raise it when what is written or kept changes: older files are then left alone
AT_A_TIME = 16  # texts that are written at a time

Ids = list[int]


@dataclass(frozen=True)
class OwnText:
    """Texts of the untouched model, padded on the right to T tokens; on the CPU."""

    ids: torch.Tensor  # (n, T) int64
    labels: torch.Tensor  # (n, T): the tokens that the model chose; -100 for what it was given, and padding
    mask: torch.Tensor  # (n, T), 1 for tokens
    top: torch.Tensor  # (n, T, k) int64: the k most likely tokens at the place of each token, most likely first
    log_p: torch.Tensor  # (n, T, k) float32: their log-probabilities

    def batch(self, rows: torch.Tensor | slice, device: torch.device) -> dict[str, torch.Tensor]:
        """Some of the texts, as the model takes them."""
        parts = {"input_ids": self.ids, "attention_mask": self.mask, "labels": self.labels}
        return {name: part[rows].to(device) for name, part in parts.items()}


def own_text(run: Preparation, method: Any, *, top: int) -> OwnText:
    """What the model of `run` writes, from disk or made now; `method` has the knobs `texts`, `tokens`, and perhaps
    `cache`."""
    given, between = openings(run.text_tokenizer, method.name)
    ends, sizes = end_tokens(run), (method.texts, method.tokens, top)
    name = key_of(VERSION, weights_hash(run.model), sizes, run.args.seed, given, between, ends)
    with kept(method, "anchor", name, run.say) as folder:
        path = folder / f"{name}.safetensors"
        if (found := _read(path)) is None:
            run.say(f"{method.name}: the untouched model writes {method.texts:,} texts, kept in {path}")
            with ready_to_write(run):
                written = _write(run, given, between, ends, method.texts, method.tokens)
                found = _scored(run.model, written, pad_id(run.text_tokenizer), top)
            part = path.with_suffix(".part")
            save_file({name: value.contiguous() for name, value in vars(found).items()}, part)
            part.replace(path)
        return found


def openings(tokenizer: Any, method: str) -> tuple[Ids, Ids]:
    """`(what every text begins with, what comes between question and answer)`.

    With a chat template a text begins as a user's turn does, before the user's first word, so that the model makes up
    the question, too; without one it begins with BOS alone (or with EOS, where there is no BOS) and has no answer.
    """
    if not tokenizer.chat_template:
        bos = tokenizer.bos_token_id
        return [tokenizer.eos_token_id if bos is None else bos], []
    turn = [{"role": "user", "content": MARK}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before, found, after = text.partition(MARK)
    if not found:
        raise ValueError(f"method {method!r}: the chat template changes what the user says, and no turn can be opened")
    return encode(tokenizer, before), encode(tokenizer, after)


def _read(path: Path) -> OwnText | None:
    try:
        # copied: load_file maps the file, which somebody may cut off later
        return OwnText(**{name: t.clone() for name, t in load_file(path).items()}) if path.is_file() else None
    except (SafetensorError, TypeError):  # cut off, or not ours
        return None


def _write(
    run: Preparation, given: Ids, between: Ids, ends: Ids, texts: int, tokens: int
) -> list[tuple[Ids, list[bool]]]:
    """Each text with what of it the model chose itself; sampled at temperature 1 from the whole distribution."""
    written, model, tokenizer = [], run.model, run.text_tokenizer
    with Replay(p.device for p in model.parameters())():
        torch.manual_seed(run.args.seed)
        for start in range(0, texts, AT_A_TIME):
            prompts = [given] * min(AT_A_TIME, texts - start)
            parts = _sample(model, tokenizer, prompts, ends, tokens // 2 if between else tokens)
            answers: list[Ids] = [[]] * len(parts)
            if between:
                parts = [question[: length_of(question, ends)] for question in parts]
                prompts = [given + question + between for question in parts]
                answers = _sample(model, tokenizer, prompts, ends, tokens - tokens // 2)
            for part, answer in zip(parts, answers):
                pieces = ((given, False), (part, True), (between, False), (answer, True))
                own = [chosen for piece, chosen in pieces for _ in piece]
                written.append((given + part + between + answer, own))
    return written


def _sample(model: Any, tokenizer: Any, prompts: Sequence[Ids], ends: Ids, new: int) -> list[Ids]:
    """Up to `new` tokens after each prompt, the end token included."""
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}  # whatever the model's own are
    out = generate(model, tokenizer, prompts, new, ends, do_sample=True, use_cache=True, **plain)
    return [own[: length_of(own, ends) + 1] for own in out]


def _scored(model: Any, written: list[tuple[Ids, list[bool]]], pad: int, top: int) -> OwnText:
    """The texts as tensors, with the model's own distribution at each place."""
    ids = padded([text for text, _ in written], pad)
    mask = padded([[1] * len(text) for text, _ in written], 0)
    labels = ids.where(padded([own for _, own in written], 0).bool(), -100)
    tops, log_ps = [], []
    for some, there in zip(ids.split(1), mask.split(1)):  # logits of all would be large
        inputs = {"input_ids": some.to(model.device), "attention_mask": there.to(model.device), "use_cache": False}
        best, log_p = likeliest_tokens(with_logits(model, **inputs).logits, top)
        # what is said at a place is the distribution of the token after it
        tops.append(best.roll(1, dims=1))
        log_ps.append(log_p.roll(1, dims=1))
    return OwnText(ids, labels, mask, torch.cat(tops), torch.cat(log_ps))
