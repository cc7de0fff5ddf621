"""`python -m lfu.demo`: fine-tune a real small model twice, by plain SFT and by LfU; what did each gain and forget?

Prints a table and writes index.html, demo.png and record.json to runs/demo. Every finished phase is kept there too, so
an interrupted run goes on where it stopped; a phase is done anew when its settings or the package's code changed.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from lfu.cli.output import check_writable
from lfu.support.errors import UserError, one_line
from lfu.support.files import dump_json, new_folder, write_text
from lfu.support.quiet import quiet_libraries

Advance = Callable[[float], None]  # called with the work just done, in the unit of the phase's total
METHODS = ("sft", "lfu")
NAMES = {"base": "the untouched model", "sft": "the SFT model", "lfu": "the LfU model"}
# Phase -> (title, seconds it took on 2 CPU cores): the first guess at the time left, corrected as phases finish.
PHASES = {
    "load": ("Load the model", 4.0),
    "data": ("Write the problems", 1.0),
    "measure-base": ("Measure the untouched model", 36.0),
    "train-sft": ("Train by plain SFT", 52.0),
    "measure-sft": ("Measure the SFT model", 32.0),
    "train-lfu": ("Train by LfU", 96.0),
    "measure-lfu": ("Measure the LfU model", 32.0),
    "compare": ("Compare, with intervals", 3.0),
    "page": ("Draw the figures and write the page", 6.0),
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is measured."""

    model: str = "smollm2"
    seed: int = 42
    rows: int = 24
    epochs: int = 3
    batch_size: int = 4
    learning_rate: float = 3e-4
    warmup_steps: float = 0.0
    alpha: float = 0.1
    lam: float | str = "auto"
    strength: float = 0.5
    max_length: int = 512
    test_rows: int = 48  # held-out problems whose reference answers are scored
    match_rows: int = 48  # the first of them, which the models also solve in their own words
    max_new_tokens: int = 64  # the longest reference answer has fewer
    questions: int | None = None  # None: all of the built-in ones
    texts: int | None = None  # None: all of the half that the settings were not chosen on


QUICK: dict[str, Any] = {
    "rows": 4,
    "epochs": 2,
    "test_rows": 4,
    "match_rows": 3,
    "max_new_tokens": 4,
    "questions": 6,
    "texts": 3,
}


# --- command line --------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo. Returns 0, 2 for what the user can put right (one line on stderr), 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        run(_settings(arguments), arguments.out, fresh=arguments.fresh, command=_command(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {arguments.out}: {one_line(error)}: free some space or choose another --out", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the finished phases are kept, run the same command to go on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lfu.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="hub name, local folder, or smollm2, the embedded default")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for page, picture and record")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--fresh", action="store_true", help="do every phase anew")
    parser.add_argument(
        "--quick", action="store_true", help="a few items only: to see whether it runs, not what it shows"
    )
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    settings = Settings(model=arguments.model, seed=arguments.seed)
    return replace(settings, **QUICK) if arguments.quick else settings


def _command(argv: Sequence[str] | None) -> str:
    return " ".join(["python -m lfu.demo", *(sys.argv[1:] if argv is None else argv)])


# --- the run -------------------------------------------------------------------------------------------------------


def run(settings: Settings, out: Path, *, fresh: bool = False, command: str = "") -> dict[str, Any]:
    """The whole demo; returns the record.

    Raises:
        UserError: a package is missing, the folder can't be written, or the model can't be loaded.
    """
    _need_packages()
    check_writable(out, "--out")
    if fresh:
        for name in ("phases", "weights"):
            shutil.rmtree(out / name, ignore_errors=True)
    with quiet_libraries():
        bench = Bench(settings, out)
        measures, training = bench.measure_all()
        with bench.board.phase("compare"):
            record = _record(bench, measures, training, command)
        with bench.board.phase("page"):
            _write_outputs(record, out)
        _print_outcome(bench.board.console, record, out)
    # Nothing reads them any more, and they are large; the phases' results stay.
    shutil.rmtree(out / "weights", ignore_errors=True)
    shutil.rmtree(out / "trainer", ignore_errors=True)
    return record


class Bench:
    """The models and the data of one run, and the phases that use them."""

    def __init__(self, settings: Settings, out: Path):
        self.settings, self.out = settings, out
        self.board = Board()
        with self.board.phase("load"):
            from lfu.model.loading import load_model

            self.model, self.tokenizer = load_model(settings.model)
            self.key = _fingerprint(settings)
        with self.board.phase("data"):
            self.train_rows, self.test_rows, self.questions, self.texts = _data(settings)

    def measure_all(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(measures, training logs) of the untouched model, of SFT's and of LfU's: in that order, one in memory."""
        measures = {"base": self._phase("measure-base", self._measuring_work(), self._measure)}
        training = {}
        for method in METHODS:
            known = self._saved(f"measure-{method}")
            if known is None and not (self.out / "weights" / method).is_dir():
                self._file(f"train-{method}").unlink(missing_ok=True)  # a log without its weights is of no use
            training[method] = self._phase(f"train-{method}", self._steps(), partial(self._train, method))
            if known is None and self.model is None:
                self._load(str(self.out / "weights" / method))
            measures[method] = self._phase(f"measure-{method}", self._measuring_work(), self._measure)
        return measures, training

    # -- phases that are kept ------------------------------------------------------------------------------------------

    def _phase(self, name: str, total: float, work: Callable[[Advance], Any]) -> Any:
        """The phase's result: from an earlier run with the same key, else from `work`, then kept."""
        saved = self._saved(name)
        if saved is not None:
            self.board.reuse(name, saved["seconds"])
            self.model = None  # whatever is in memory is not this phase's model
            return saved["result"]
        start = time.monotonic()
        with self.board.phase(name, total) as advance:
            result = work(advance)
        write_text(
            self._file(name), dump_json({"key": self.key, "seconds": time.monotonic() - start, "result": result})
        )
        return result

    def _file(self, name: str) -> Path:
        return self.out / "phases" / f"{name}.json"

    def _saved(self, name: str) -> dict[str, Any] | None:
        """What an earlier run kept, if it was made with the same settings, data, code and libraries."""
        try:
            saved = json.loads(self._file(name).read_text(encoding="utf-8"))
            return saved if saved["key"] == self.key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    # -- training ------------------------------------------------------------------------------------------------------

    def _steps(self) -> int:
        return -(-len(self.train_rows) // self.settings.batch_size) * self.settings.epochs

    def _load(self, name: str) -> None:
        from lfu.model.loading import load_model

        self.model = None
        gc.collect()  # two float32 models and Adam's state at once would need twice the memory
        self.model, _ = load_model(name)

    def _train(self, method: str, advance: Advance) -> dict[str, Any]:
        """Trains a fresh copy of the model and keeps its weights on disk.

        Returns:
            `log`: the trainer's, one entry a step; `advice`: the warnings that LfUTrainer gave.
        """
        from datasets import Dataset
        from transformers import PrinterCallback

        from lfu import LfUTrainer
        from lfu.data.templates import to_training_rows
        from lfu.training.advice import LfUAdvice

        self._load(self.settings.model)
        trainer = LfUTrainer(
            self.model,
            args=_config(self.settings, method, self.out / "trainer"),
            train_dataset=to_training_rows(
                Dataset.from_list(self.train_rows), template="chat", tokenizer=self.tokenizer
            ),
            processing_class=self.tokenizer,
            callbacks=[_on_step(advance)],
        )
        trainer.remove_callback(PrinterCallback)  # it would print every step
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", LfUAdvice)
            trainer.train()
        _save(trainer.model, self.tokenizer, self.out / "weights" / method)
        return {
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
            "advice": [str(warning.message) for warning in heard],
        }

    # -- measuring -----------------------------------------------------------------------------------------------------

    def _measuring_work(self) -> float:
        """Tokens through the model, roughly: what the progress bar counts."""
        return sum(self._cost().values())

    def _cost(self) -> dict[str, float]:
        s = self.settings
        return {
            "answers": len(self.test_rows) * 110,
            "match": s.match_rows * (70 + 3 * s.max_new_tokens),  # one token at a time is slower
            "knowledge": len(self.questions) * 40,
            "prose": len(self.texts) * 80,
        }

    def _measure(self, advance: Advance) -> dict[str, Any]:
        """All four scores of the model in memory, per item."""
        from lfu.evaluation.score import answer_nll, exact_match, multiple_choice, perplexity

        model, tokenizer, s = self.model, self.tokenizer, self.settings
        items = {"answers": self.test_rows, "match": self.test_rows[: s.match_rows]}
        items |= {"knowledge": self.questions, "prose": self.texts}
        each = {name: cost / len(items[name]) for name, cost in self._cost().items()}
        tick = lambda name: lambda n: advance(n * each[name])
        return {
            "answers": asdict(answer_nll(model, tokenizer, items["answers"], progress=tick("answers"))),
            "knowledge": asdict(multiple_choice(model, tokenizer, items["knowledge"], progress=tick("knowledge"))),
            "prose": asdict(perplexity(model, tokenizer, items["prose"], progress=tick("prose"))),
            "match": asdict(
                exact_match(model, tokenizer, items["match"], max_new_tokens=s.max_new_tokens, progress=tick("match"))
            ),
        }


def _data(settings: Settings) -> tuple[list[Any], list[Any], list[Any], list[str]]:
    """(training rows, held-out rows, questions, texts)."""
    from lfu.data.probes import general_knowledge, plain_text
    from lfu.data.word_problems import word_problems

    return (
        word_problems("train", settings.rows, settings.seed),
        word_problems("test", settings.test_rows, settings.seed),
        general_knowledge()[: settings.questions],
        [row["text"] for row in plain_text()[1::2][: settings.texts]],  # [::2] served to choose the settings
    )


def _config(settings: Settings, method: str, folder: Path) -> Any:
    """The same for both methods, but for what makes LfU LfU."""
    from lfu import LfUConfig

    own: dict[str, Any] = (
        {"alpha": settings.alpha, "lam": settings.lam, "strength": settings.strength} if method == "lfu" else {}
    )
    return LfUConfig(
        output_dir=str(folder),
        method=method,
        seed=settings.seed,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=1,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type="linear",
        max_length=settings.max_length,
        bf16=False,  # float32 on every machine: the two runs differ by the method alone
        gradient_checkpointing=False,  # it would save memory that isn't short here, for a third more time
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        log_level="error",
        disable_tqdm=True,
        **own,
    )


def _on_step(advance: Advance) -> Any:
    from transformers import TrainerCallback

    class Step(TrainerCallback):
        """Moves the progress bar."""

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            advance(1)

    return Step()


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """A whole model folder or none."""
    with new_folder(folder) as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)


# --- record, page, table -------------------------------------------------------------------------------------------


def _record(bench: Bench, measures: Mapping[str, Any], training: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Everything that was set, measured and concluded, JSON-ready."""
    from lfu.evaluation.record import machine, versions
    from lfu.report.demo_summary import CHOSEN, knowledge_transitions, summarise, verdict

    try:
        summary = summarise(measures)
    except ValueError as error:
        raise UserError(f"a model's scores are not finite numbers ({error}): its training diverged") from error
    loose = {who: 100 * sum(m["match"]["correct_any"]) / len(m["match"]["correct_any"]) for who, m in measures.items()}
    return {
        "model": "SmolLM2-135M-Instruct" if bench.settings.model == "smollm2" else bench.settings.model,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "settings": asdict(bench.settings),
        "chosen": CHOSEN,
        "verdict": verdict(summary),
        "summary": summary,
        "transitions": knowledge_transitions(measures),
        "loose": loose,
        "times": bench.board.times,
        "training": {method: result["log"] for method, result in training.items()},
        "advice": [message for result in training.values() for message in result["advice"]],
        "measures": dict(measures),
        "train_rows": bench.train_rows,
        "test_rows": bench.test_rows,
    }


def _write_outputs(record: dict[str, Any], out: Path) -> None:
    from lfu.report.demo_figures import gain_and_loss
    from lfu.report.demo_page import page

    drawing = out / ".demo.png"
    what = f"{record['model']}, {record['settings']['rows']} training rows, one seed"
    gain_and_loss(record["summary"], drawing, what)
    os.replace(drawing, out / "demo.png")
    write_text(out / "record.json", dump_json(record))
    write_text(out / "index.html", page(record))


def _print_outcome(console: Any, record: Mapping[str, Any], out: Path) -> None:
    from lfu.report.demo_summary import PAIRS, WHO

    marks = {1: ("green", "better"), -1: ("red", "worse"), 0: ("dim", "no difference")}
    values, differences = [], []
    for row in record["summary"]:
        first = f"{row['title']}\n[dim]{row['items']} items[/]"
        values.append([first, *(f"{row['values'][who]['text']}\n[dim]{row['values'][who]['range']}[/]" for who in WHO)])
        cells = []
        for one, two in PAIRS:
            d = row["differences"][f"{one}-{two}"]
            colour, word = marks[d["better"]]
            cells.append(f"{d['text']}\n[dim]{d['range']}[/]\n[{colour}]{word}[/]")
        differences.append([first, *cells])
    console.print(_table("Measured, with 95 % intervals", list(WHO.values()), values))
    between = [f"{WHO[one]} − {WHO[two]}" for one, two in PAIRS]
    console.print(_table("Differences, on the same items", between, differences))
    for message in record["advice"]:
        console.print(f"[yellow]advice:[/] {message}", highlight=False)
    for sentence in record["verdict"]:
        console.print(sentence, highlight=False)
    # not through rich, which would break a long path over two lines
    print(f"page     {out / 'index.html'}\npicture  {out / 'demo.png'}\nnumbers  {out / 'record.json'}")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row, end_section=True)
    return table


# --- progress ------------------------------------------------------------------------------------------------------


class Board:
    """Numbered phases with a progress bar each, and an estimate of the time that the whole run still takes."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console()
        self.times: list[dict[str, Any]] = []
        self._left = {name: seconds for name, (_, seconds) in PHASES.items()}
        self._spent = self._expected = 0.0

    @contextmanager
    def phase(self, name: str, total: float | None = None) -> Iterator[Advance]:
        """Runs one phase; call what it yields with the work just done, `total` altogether (None: the bar pulses)."""
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        heading, expected, start = self._heading(name), self._left[name], time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        if not self.console.is_terminal:
            self.console.print(f"{heading} ... ({self._estimate(expected)})", highlight=False)
        with Progress(
            *columns, TextColumn("[dim]{task.fields[left]}"), console=self.console, transient=True,
            disable=not self.console.is_terminal, refresh_per_second=4,
        ) as bar:  # fmt: skip
            task = bar.add_task(heading, total=total, left=self._estimate(expected))
            done = 0.0

            def advance(work: float) -> None:
                nonlocal done
                done += work
                share = min(1.0, done / (total or done))
                elapsed = time.monotonic() - start
                here = elapsed * (1 - share) / share if share > 0.1 else expected * self._pace() * (1 - share)
                bar.update(task, completed=done, left=self._estimate(0, here))

            yield advance
        seconds = time.monotonic() - start
        self._spent += seconds
        self._expected += expected
        self._finish(name, seconds, reused=False)

    def reuse(self, name: str, seconds: float) -> None:
        """A phase whose result an earlier run left."""
        self._finish(name, seconds, reused=True)

    def _finish(self, name: str, seconds: float, reused: bool) -> None:
        heading = self._heading(name)
        self._left.pop(name)
        self.times.append({"phase": name, "title": PHASES[name][0], "seconds": seconds, "reused": reused})
        how = "reused" if reused else f"{seconds:.0f} s"
        self.console.print(f"{heading}: {how}", highlight=False)

    def _heading(self, name: str) -> str:
        return f"\\[{list(PHASES).index(name) + 1}/{len(PHASES)}] {PHASES[name][0]}"

    def _pace(self) -> float:
        """How much longer than guessed the phases so far have taken; 1 until there is something to go by."""
        return self._spent / self._expected if self._expected > 20 else 1.0

    def _estimate(self, now: float, known: float = 0.0) -> str:
        """'about 4 min left': `now` guessed seconds of this phase or `known` ones, and the guess for those to come."""
        ahead = list(self._left.values())[1:]
        seconds = known + self._pace() * (now + sum(ahead))
        return f"about {round(seconds / 60)} min left in all" if seconds >= 90 else f"about {seconds:.0f} s left in all"


# --- small things --------------------------------------------------------------------------------------------------


def _need_packages() -> None:
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _fingerprint(settings: Settings) -> str:
    """Changes with the settings, the model's files, the package's code and data, and the libraries."""
    from lfu.evaluation.record import versions

    digest = hashlib.sha256(json.dumps([asdict(settings), versions()], sort_keys=True).encode())
    package = Path(__file__).parent
    for file in sorted(package.rglob("*")):
        apart = file.relative_to(package).parts[0] in ("report", "cli", "recipes", "study")  # change no measurement
        if file.suffix in (".py", ".jsonl") and not apart:
            digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    folder = Path(settings.model)
    for file in sorted(folder.glob("*")) if folder.is_dir() else ():
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
