"""Talk to a model in the terminal, with the untouched one beside it.

Answers are streamed. Each model keeps the conversation, with its own answers. Ctrl-C stops an answer. Ctrl-D or /quit
leaves. /new starts a new conversation. Lines may be piped in: lfu chat RUN --beside < questions.txt"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from lfu.cli.parser import LineParser
from lfu.support.errors import UserError

FROM_ADAPTER = ""  # --beside without a name
HELP = "/new starts a new conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


def run(argv: list[str]) -> int:
    """Answers line after line, until the end of the input.

    Raises:
        UserError: a model that can't be loaded, or no base to put beside it.
    """
    given = _parser().parse_args(argv)
    speakers = _speakers(given)
    for prompt in _prompts(sys.stdin.isatty()):
        if prompt in ("/quit", "/exit"):
            break
        if prompt == "/new":
            for speaker in speakers:
                speaker.forget()
            print("(a new conversation)")
        elif prompt.startswith("/"):
            print(f"({HELP})")
        elif prompt:
            try:
                _answer(prompt, speakers)
            except KeyboardInterrupt:  # between two answers
                print(" (stopped)")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = LineParser(prog="lfu chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a hub name, a model or adapter folder, or smollm2")
    parser.add_argument(
        "--beside", nargs="?", const=FROM_ADAPTER, metavar="BASE",
        help="show the untouched model's answers too; without a name, those of the adapter's base model",
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--max_new_tokens", type=_positive, default=512, metavar="N", help="most tokens per answer (default: 512)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="draw answers at this temperature; 0 (the default) always takes the likeliest token",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of drawn answers (default: 0)")
    parser.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float16", "float32"], help="load the weights as this type"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def _prompts(terminal: bool) -> Iterator[str]:
    """Lines of the user's: at a terminal with a prompt and the arrow keys, else from stdin, shown as they come."""
    if not terminal:
        for line in sys.stdin:
            if text := line.strip():
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


def _speakers(given: argparse.Namespace) -> list[Speaker]:
    """The tuned model, then the untouched one if it is wanted: with an adapter the same one, the adapter off."""
    from lfu.model.loading import adapter_base, is_adapter

    if given.temperature < 0:
        raise UserError(f"--temperature must be at least 0, got {given.temperature:g}")
    adapter = is_adapter(given.model)
    if given.beside == FROM_ADAPTER and not adapter:
        raise UserError(f"{given.model} is a full model and names no base: give it, as in --beside smollm2")
    model, tokenizer = _load(given.model, given)
    tuned = Speaker("tuned" if given.beside is not None else "model", model, tokenizer, given)
    if given.beside is None:
        return [tuned]
    if adapter and given.beside in (FROM_ADAPTER, adapter_base(given.model)):
        return [tuned, Speaker("untouched", model, tokenizer, given, model.disable_adapter)]
    return [tuned, Speaker("untouched", *_load(given.beside, given), given)]


def _load(name: str, given: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    from lfu.data.templates import check_chat_template
    from lfu.model.loading import load_model
    from lfu.support.quiet import quiet_libraries

    gpu = torch.cuda.is_available()
    dtype = given.dtype or ("auto" if gpu else "float32")
    with quiet_libraries():
        model, tokenizer = load_model(name, dtype=dtype, trust_remote_code=given.trust_remote_code)
    check_chat_template(tokenizer)
    return (model.to("cuda") if gpu else model).eval(), tokenizer


class Speaker:
    """One model in a conversation of its own.

    Args:
        name: what its answers are headed with.
        model, tokenizer: as loaded.
        given: the command's flags.
        around: makes a context in which the model speaks.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, given: argparse.Namespace,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):  # fmt: skip
        self.name, self.model, self.tokenizer, self.given, self.around = name, model, tokenizer, given, around
        self.turns: list[dict[str, str]] = []
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
            torch.manual_seed(self.given.seed)
            with self.around():
                self._generate(self._ids(), hear)
        except KeyboardInterrupt:
            return False
        finally:
            self.turns.append({"role": "assistant", "content": "".join(heard).strip()})
        return True

    def _ids(self) -> Any:
        """The conversation as tokens, its oldest exchanges left out where it has become too long."""
        from lfu.evaluation.hidden import longest_input

        room = longest_input(self.model, most=2**20) - self.given.max_new_tokens
        start = 1 if self.given.system else 0
        while True:
            ids = self._encoded()
            if len(ids) <= max(room, 1) or len(self.turns) <= start + 1:
                return ids[-max(room, 1) :]
            del self.turns[start : start + 2]

    def _encoded(self) -> list[int]:
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(self.turns, tokenize=False, add_generation_prompt=True)
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        from lfu.data.templates import alpaca_prompt  # as `lfu train` writes rows for such a model

        asked = [
            alpaca_prompt(turn["content"], system=self.given.system) if turn["role"] == "user" else turn["content"]
            for turn in self.turns
            if turn["role"] != "system"
        ]
        return list(self.tokenizer("\n\n".join(asked))["input_ids"])

    def _generate(self, ids: list[int], show: Callable[[str], Any]) -> None:
        import torch
        from transformers import TextStreamer

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                if text:
                    show(text)

        inputs = torch.tensor([ids], device=self.model.device)
        drawn = {"temperature": self.given.temperature} if self.given.temperature else {"temperature": None}
        pad = self.tokenizer.pad_token_id
        self.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=self.given.max_new_tokens,
            do_sample=self.given.temperature > 0,
            **drawn,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            streamer=Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )


# -- on the screen -----------------------------------------------------------------------------------------------------


def _answer(prompt: str, speakers: list[Speaker]) -> None:
    """Every speaker's answer: one after the other, or in columns where a terminal is wide enough for two."""
    from rich.console import Console

    console = Console()
    if len(speakers) > 1 and console.is_terminal and console.width >= 60:
        _in_columns(console, prompt, speakers)
        return
    for speaker in speakers:
        print(f"{speaker.name}> ", end="", flush=True)
        ended = speaker.answer(prompt, lambda piece: print(piece, end="", flush=True))
        print("" if ended else " (stopped)", flush=True)


def _in_columns(console: Any, prompt: str, speakers: list[Speaker]) -> None:
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    texts = {speaker.name: "" for speaker in speakers}

    def page(lines: int | None = None) -> Table:
        table = Table(expand=True, show_lines=False)
        for name in texts:
            table.add_column(name, ratio=1, overflow="fold")
        room = (console.width - 3 * len(texts) - 1) // len(texts)
        cells = [Text(text).wrap(console, room)[-lines:] if lines else [Text(text)] for text in texts.values()]
        table.add_row(*(Text("\n").join(cell) for cell in cells))
        return table

    # while it grows only as much as fits the screen; in the end all of it
    with Live(page(), console=console, refresh_per_second=12) as live:
        for speaker in speakers:

            def show(piece: str, name: str = speaker.name) -> None:
                texts[name] += piece
                live.update(page(max(1, console.height - 6)))

            if not speaker.answer(prompt, show):
                texts[speaker.name] += " (stopped)"
        live.update(page(), refresh=True)
