"""From rows and texts to token ids, and from where on they count: the pieces that all measures read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from lfu.data.templates import TEMPLATES, alpaca_prompt, around
from lfu.data.turns import MARK, said, shared_start, special_ids
from lfu.support.annotations import Model, Tokenizer
from lfu.support.choices import one_of


class Asked(NamedTuple):
    """A row as a model reads it, as text."""

    prompt: str
    answer: str
    plain: bool = False  # no chat template wrote it, so the tokenizer puts its own tokens in front, as in training


Render = Callable[[Any, Mapping[str, Any]], tuple[str, str] | Asked]  # (tokenizer, row) -> (prompt, answer)


@dataclass(frozen=True)
class Piece:
    """One sequence of tokens of text or row number `item`; `ids[start:]` are scored, or what predicts them is read."""

    ids: list[int]
    start: int
    item: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return len(self.ids) - self.start


def text_pieces(tokenizer: Tokenizer, texts: Sequence[str], window: int = 1024, *, start: int = 2) -> list[Piece]:
    """Plain texts as consecutive pieces of at most `window` tokens, each beginning as a text does: nothing is cut off.

    Args:
        start: the first token of each piece that counts. 1 for a likelihood: the first token follows nothing. 2 for
            hidden states: at the first position most models park one huge vector that is the same for every text
            (massive activations, Sun et al. 2024), and a similarity over all positions would measure little else.

    Raises ValueError: no texts, or a text without a token that counts.
    """
    if not texts:
        raise ValueError("no texts to score")
    pieces, (front, _) = [], around(tokenizer)
    size = window - len(front)
    for item, text in enumerate(texts):
        ids = encode(tokenizer, text, special=True)
        if len(ids) <= start:
            raise ValueError(f"text {item + 1} has fewer than {('two', 'three')[start - 1]} tokens: {text!r}")
        windows = [front + ids[begin : begin + size] for begin in range(len(front), len(ids), size)]
        pieces += [Piece(part, start, item) for part in windows if len(part) > start]
    return pieces


def answer_pieces(
    tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]], *, render: Render | None = None, window: int | None = None
) -> list[Piece]:
    """Rows, `{"question", "answer"}` or whatever `render` (default: `chat_pair`) reads, as pieces.

    The answer's tokens count. A row may have `window` tokens.

    Raises ValueError: no rows; a row that is too long, or whose answer has no token; no chat template and no `render`.
    """
    if not rows:
        raise ValueError("no rows to score")
    pieces = []
    for item, row in enumerate(rows):
        asked = Asked(*(render or chat_pair)(tokenizer, row))
        ids = encode(tokenizer, asked.prompt + asked.answer, asked.plain)
        piece = Piece(ids, max(1, shared_start(encode(tokenizer, asked.prompt, asked.plain), ids)), item)
        if piece.tokens < 1:
            raise ValueError(f"row {item + 1} has no answer token to score")
        if window is not None and len(ids) > window:
            raise ValueError(f"row {item + 1} has {len(ids)} tokens, more than the {window} that the model reads")
        pieces.append(piece)
    return pieces


def encode(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    """Token ids; `special` adds what the tokenizer puts in front of plain text (a template brings its own).

    What it puts behind is left out: some tokenizers end every text, and no prompt may end before its answer.
    """
    made = tokenizer(text, add_special_tokens=special, return_special_tokens_mask=True, verbose=False)
    ids, added = list(made["input_ids"]), made["special_tokens_mask"]
    while special and ids and added[len(ids) - 1]:
        ids.pop()
    return ids


def longest_input(model: Model, most: int = 1024) -> int:
    """The tokens that the model can read at once, `most` at most."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(known, most) if isinstance(known, int) and known > 0 else most


def chat_pair(tokenizer: Tokenizer, row: Mapping[str, Any]) -> tuple[str, str]:
    """(prompt, answer) of a `{"question", "answer"}` row in the tokenizer's chat template.

    The prompt ends where the assistant's turn begins; the answer includes the end of that turn, as in TRL's
    prompt-completion data.

    Raises ValueError: the tokenizer has no chat template, or one that rewrites the prompt once the answer is there.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: pass render=, which makes (prompt, answer) of a row")
    turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    return last_answer(tokenizer, turns, {}, hint=": pass render= instead")


def last_answer(
    tokenizer: Tokenizer, turns: Sequence[Mapping[str, Any]], options: Mapping[str, Any], hint: str = ""
) -> tuple[str, str]:
    """(prompt, answer) of a conversation whose last turn is the answer; `options` are the chat template's.

    Where the generation prompt opens a reasoning (`<think>`) that the template doesn't write for an answer without one,
    the prompt ends before it, as it does in training.

    Raises ValueError: a template that doesn't keep the prompt in front of the answer; `hint` ends the message.
    """
    written = partial(tokenizer.apply_chat_template, tokenize=False, **options)
    prompt, whole = written(turns[:-1], add_generation_prompt=True), written(turns)
    if not whole.startswith(prompt):
        other = written([*turns[:-1], said("assistant", MARK)])  # an answer may begin as a reasoning does
        prompt = prompt[: min(shared_start(prompt, one) for one in (whole, other))]
        if not prompt.startswith(written(turns[:-1])):
            raise ValueError(f"the chat template doesn't keep the prompt in front of the answer{hint}")
    return prompt, whole[len(prompt) :]


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template writes behind an answer, if it has one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = tokenizer.apply_chat_template([said("user", "a"), said("assistant", MARK)], tokenize=False)
    except Exception:  # a template that wants more than that
        return None
    special = special_ids(tokenizer)
    return next((token for token in encode(tokenizer, text.partition(MARK)[2]) if token in special), None)


def render_of(tokenizer: Tokenizer, template: str = "auto") -> Render:
    """How `lfu train` would put a question: `chat`, `alpaca`, `none` (the bare question), or `auto`: chat if the
    tokenizer has a chat template, else alpaca.

    Raises ValueError: an unknown template, or `chat` without a chat template.
    """
    one_of("template", template, TEMPLATES)
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_chat:
        raise ValueError("template chat: the tokenizer has no chat template: use alpaca or none")
    if template == "chat" or (template == "auto" and has_chat):
        return chat_pair
    prompt = "{}\n".format if template == "none" else alpaca_prompt
    return lambda tok, row: plain_pair(tok, prompt(row["question"]), row["answer"])


def plain_pair(tokenizer: Tokenizer, prompt: str, answer: str) -> Asked:
    """Prompt and answer that are plain texts; TRL ends the answer with the end-of-sequence token, once."""
    end = tokenizer.eos_token or ""
    return Asked(prompt, answer if answer.endswith(end) else answer + end, plain=True)
