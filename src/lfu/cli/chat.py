"""Talk to a model in the terminal, with the untouched one beside it.

Answers are streamed. Each model keeps the conversation, with its own answers. Ctrl-C stops an answer. Ctrl-D or /quit
leaves. /new starts a new conversation. Lines may be piped in: lfu chat RUN --beside < questions.txt"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from lfu.cli.models import Loading, template
from lfu.data.templates import as_text, check_chat_template, chosen_template
from lfu.support.errors import UserError
from lfu.support.flags import argument, at_least_one, from_zero, not_negative, option, read

FROM_ADAPTER = ""  # --beside without a name
HELP = "/new starts a new conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


@dataclass(kw_only=True)
class Chat(Loading):
    """The flags of `lfu chat`."""

    model: str = argument("MODEL", "a hub name, a model or adapter folder, or a built-in name: smollm2, gemma3-270m")
    beside: str | None = option(
        None, "show the untouched model's answers too; without a name, those of the adapter's base model", nargs="?",
        const=FROM_ADAPTER, metavar="BASE",
    )  # fmt: skip
    system: str | None = option(None, "system message", metavar="TEXT")
    template: str = template()
    max_new_tokens: int = option(512, "most tokens per answer", type=at_least_one)
    temperature: float = option(
        0.0, "draw answers at this temperature; 0 (the default) always takes the likeliest token", type=from_zero,
        metavar="T",
    )  # fmt: skip
    seed: int | None = option(None, "seed of drawn answers (default: 0)", type=not_negative)

    def __post_init__(self) -> None:
        if self.seed is not None and not self.temperature:
            raise UserError("--seed is for drawn answers: give a --temperature above 0, too")


def run(argv: list[str]) -> int:
    """Answers line after line, until the end of the input."""
    speaking = speakers(read(Chat, "lfu chat", __doc__, argv))
    for prompt in _prompts(sys.stdin.isatty()):
        if prompt in ("/quit", "/exit"):
            break
        if prompt == "/new":
            for speaker in speaking:
                speaker.forget()
            print("(a new conversation)")
        elif prompt.startswith("/"):
            print(f"({HELP})")
        elif prompt:
            try:
                _answer(prompt, speaking)
            except KeyboardInterrupt:  # between two answers
                print(" (stopped)")
    return 0


def _prompts(terminal: bool) -> Iterator[str]:
    """The user's lines: typed at a prompt on a terminal, else read from stdin and echoed."""
    if not terminal:
        for text in filter(None, map(str.strip, sys.stdin)):
            print(f"you> {text}", flush=True)
            yield text
        return
    with suppress(ImportError):
        import readline  # noqa: F401 (input() then has history and editing)
    print(f"({HELP})")
    while True:
        try:
            yield input("you> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n({HELP})")


def speakers(given: Chat) -> list[Speaker]:
    """The tuned model, then the untouched one if wanted; with an adapter that is the same model, its adapter off."""
    from lfu.model.loading import adapter_base, is_adapter

    adapter = is_adapter(given.model)
    if given.beside == FROM_ADAPTER and not adapter:
        raise UserError(f"{given.model} is a full model and names no base: give it, as in --beside smollm2")
    tuned = Speaker("tuned" if given.beside is not None else "model", *_load(given.model, given), given)
    if given.beside is None:
        return [tuned]
    if adapter and given.beside in (FROM_ADAPTER, adapter_base(given.model)):
        return [tuned, Speaker("untouched", tuned.model, tuned.tokenizer, given, tuned.model.disable_adapter)]
    return [tuned, Speaker("untouched", *_load(given.beside, given), given)]


def _load(name: str, given: Chat) -> tuple[Any, Any]:
    model, tokenizer = given.load(name)
    check_chat_template(tokenizer)
    chosen_template(given.template, bool(tokenizer.chat_template))  # refuses one that isn't there
    return model.eval(), tokenizer


@dataclass
class Speaker:
    """One model with a conversation of its own. `name` stands before its answers; it generates them within `around`."""

    name: str
    model: Any
    tokenizer: Any
    given: Chat
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Starts a new conversation."""
        self.turns = [{"role": "system", "content": self.given.system}] if self.given.system else []

    def answer(self, prompt: str, show: Callable[[str], None]) -> bool:
        """Answers into `show`, piece by piece, and remembers it. False if the user stopped it."""
        import torch

        self.turns.append({"role": "user", "content": prompt})
        heard: list[str] = []

        def hear(piece: str) -> None:
            heard.append(piece)
            show(piece)

        try:
            torch.manual_seed(self.given.seed or 0)
            with self.around():
                self._generate(self.ids(), hear)
        except KeyboardInterrupt:
            return False
        finally:
            self.turns.append({"role": "assistant", "content": "".join(heard).strip()})
        return True

    def ids(self) -> list[int]:
        """The conversation as tokens, without its oldest exchanges if it has become too long."""
        from lfu.evaluation.pieces import longest_input

        room = max(1, longest_input(self.model, most=2**20) - self.given.max_new_tokens)
        start = 1 if self.given.system else 0
        while len(ids := self._encoded()) > room and len(self.turns) > start + 1:
            del self.turns[start : start + 2]
        return ids[-room:]

    def _encoded(self) -> list[int]:
        from lfu.evaluation.pieces import encode

        template = chosen_template(self.given.template, bool(self.tokenizer.chat_template))
        if template == "chat":
            text = self.tokenizer.apply_chat_template(self.turns, tokenize=False, add_generation_prompt=True)
            return encode(self.tokenizer, text)
        asked = as_text([*self.turns, {"role": "assistant", "content": ""}], template, self.tokenizer.eos_token or "")
        return encode(self.tokenizer, asked["prompt"], special=True)

    def _generate(self, ids: list[int], show: Callable[[str], Any]) -> None:
        from transformers import TextStreamer

        from lfu.evaluation.batching import end_tokens, generate

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                if text:
                    show(text)

        how: dict[str, Any] = {"streamer": Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)}
        if self.given.temperature:
            how |= {"do_sample": True, "temperature": self.given.temperature}
        ends = end_tokens(self.model, self.tokenizer)
        generate(self.model, self.tokenizer, [ids], self.given.max_new_tokens, ends, **how)


def _answer(prompt: str, speaking: list[Speaker]) -> None:
    """Every speaker's answer: one after the other, or in columns where a terminal is wide enough for two."""
    from rich.console import Console

    console = Console()
    if len(speaking) > 1 and console.is_terminal and console.width >= 60:
        _in_columns(console, prompt, speaking)
        return
    for speaker in speaking:
        print(f"{speaker.name}> ", end="", flush=True)
        ended = speaker.answer(prompt, lambda piece: print(piece, end="", flush=True))
        print("" if ended else " (stopped)", flush=True)


def _in_columns(console: Any, prompt: str, speaking: list[Speaker]) -> None:
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    texts = {speaker.name: "" for speaker in speaking}

    def page(lines: int | None = None) -> Table:
        table = Table(expand=True, show_lines=False)
        for name in texts:
            table.add_column(name, ratio=1, overflow="fold")
        room = (console.width - 3 * len(texts) - 1) // len(texts)
        cells = [Text(text).wrap(console, room)[-lines:] if lines else [Text(text)] for text in texts.values()]
        table.add_row(*(Text("\n").join(cell) for cell in cells))
        return table

    # only what fits the screen while it grows, all of it at the end
    with Live(page(), console=console, refresh_per_second=12) as live:
        for speaker in speaking:

            def show(piece: str, name: str = speaker.name) -> None:
                texts[name] += piece
                live.update(page(max(1, console.height - 6)))

            if not speaker.answer(prompt, show):
                texts[speaker.name] += " (stopped)"
        live.update(page(), refresh=True)
