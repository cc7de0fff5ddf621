"""What the untouched model writes when nobody asks it anything, and how sure it is of each token: kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lfu.evaluation.batching import encode, evaluating, left_pad, pad_id, with_logits
from lfu.evaluation.record import weights_hash
from lfu.methods.method import Preparation
from lfu.methods.rows import end_tokens
from lfu.methods.sdft import on_training_device
from lfu.model.precision import wide
from lfu.support.errors import UserError, one_line

VERSION = 1  # raise it when what is written or kept changes: older files are then left alone
AT_A_TIME = 16  # texts that are written at a time
MARK = "<<the user's words>>"

Ids = list[int]


@dataclass(frozen=True)
class OwnText:
    """Texts of the untouched model, padded on the right to T tokens; on the CPU.

    Attributes:
        ids: `(n, T)`, int64.
        labels: `(n, T)`: the tokens that the model chose; -100 for what it was given, and padding.
        mask: `(n, T)`, 1 for tokens.
        top: `(n, T, k)`, int64: the k most likely tokens at the place of each token, most likely first.
        log_p: `(n, T, k)`, float32: their log-probabilities.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    top: torch.Tensor
    log_p: torch.Tensor


def own_text(
    run: Preparation, folder: Path, method: str, elsewhere: str, *, texts: int, tokens: int, top: int
) -> OwnText:
    """What the model of `run` writes, from `folder` or made now; the second of several processes waits for the first.

    Args:
        method: who asks, for messages.
        elsewhere: how the user names another folder, for messages.

    Raises:
        UserError: the folder can't be used.
        ValueError: a chat template in which no turn can be opened.
    """
    tokenizer = getattr(run.tokenizer, "tokenizer", run.tokenizer)  # a processor holds one
    given, between = openings(tokenizer, method)
    ends = end_tokens(run)
    settings = [VERSION, weights_hash(run.model), texts, tokens, top, run.args.seed, given, between, ends]
    path = folder / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if (found := _read(path)) is None:
                run.say(f"{method}: the untouched model writes {texts:,} texts, kept in {path}")
                with evaluating(run.model), torch.no_grad(), on_training_device(run.args.device, run.model):
                    written = _write(run.model, tokenizer, given, between, ends, texts, tokens, run.args.seed)
                    found = _scored(run.model, written, pad_id(tokenizer), top)
                part = path.with_suffix(".part")
                save_file({name: value.contiguous() for name, value in vars(found).items()}, part)
                part.replace(path)
            return found
    except OSError as error:
        raise UserError(
            f"{method} can't keep its texts in {folder} ({one_line(error)}): name a folder that can be written to, "
            f"{elsewhere}"
        ) from error


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
    model: Any, tokenizer: Any, given: Ids, between: Ids, ends: Ids, texts: int, tokens: int, seed: int
) -> list[tuple[Ids, list[bool]]]:
    """Each text with what of it the model chose itself; sampled at temperature 1 from the whole distribution."""
    written: list[tuple[Ids, list[bool]]] = []
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for start in range(0, texts, AT_A_TIME):
            count = min(AT_A_TIME, texts - start)
            asked = _sample(model, tokenizer, [given] * count, ends, tokens // 2 if between else tokens)
            if not between:
                written += [(given + own, [False] * len(given) + [True] * len(own)) for own in asked]
                continue
            questions = [own[:-1] if own and own[-1] in ends else own for own in asked]
            prompts = [given + question + between for question in questions]
            for question, prompt, answer in zip(
                questions, prompts, _sample(model, tokenizer, prompts, ends, tokens - tokens // 2)
            ):
                own = [False] * len(given) + [True] * len(question) + [False] * len(between) + [True] * len(answer)
                written.append((prompt + answer, own))
    return written


def _sample(model: Any, tokenizer: Any, prompts: Sequence[Ids], ends: Ids, new: int) -> list[Ids]:
    """Up to `new` tokens after each prompt, the end token included."""
    ids, mask = left_pad(prompts, pad_id(tokenizer), model.device)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=True, num_beams=1, temperature=1.0, top_p=1.0,
        top_k=0, repetition_penalty=1.0, eos_token_id=ends or None, pad_token_id=pad_id(tokenizer), use_cache=True,
    )[:, ids.shape[1] :].tolist()  # fmt: skip
    length = lambda own: next((place + 1 for place, token in enumerate(own) if token in ends), len(own))
    return [own[: length(own)] for own in out]


def _scored(model: Any, written: list[tuple[Ids, list[bool]]], pad: int, top: int) -> OwnText:
    """The texts as tensors, with the model's own distribution at each place."""
    longest = max(len(ids) for ids, _ in written)
    fill = lambda value: torch.full((len(written), longest), value)
    ids, labels, mask = fill(pad), fill(-100), fill(0)
    for row, (text, own) in enumerate(written):
        line = torch.tensor(text)
        ids[row, : len(text)], mask[row, : len(text)] = line, 1
        labels[row, : len(text)] = line.where(torch.tensor(own), -100)
    tops, log_ps = [], []
    for some, there in zip(ids.split(1), mask.split(1)):  # logits of all would be large
        inputs = {"input_ids": some.to(model.device), "attention_mask": there.to(model.device), "use_cache": False}
        log_p = wide(with_logits(model, **inputs).logits).log_softmax(-1)
        best = log_p.topk(min(top, log_p.shape[-1]), dim=-1)
        # what is said at a place is the distribution of the token after it
        tops.append(best.indices.roll(1, dims=1).cpu())
        log_ps.append(best.values.roll(1, dims=1).float().cpu())
    return OwnText(ids, labels, mask, torch.cat(tops), torch.cat(log_ps))
