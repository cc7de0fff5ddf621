"""Score models on many tasks with lm-evaluation-harness, by category, and show what each gained and forgot.

By default: the eleven tasks of the LfU paper in their four categories, from the hub; with --data_dir the same tasks
from local files. A task that is not available is named as missing, and never averaged away. Finished tasks are kept,
and the same command continues where it was stopped."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from lfu.cli import output
from lfu.cli.parser import LineParser
from lfu.support.errors import UserError
from lfu.support.flags import at_least_one, not_negative

DEFINITIONS = "tasks"  # folder below --output_dir


def run(argv: list[str]) -> int:
    """Scores, writes record.json, index.html, report.md and pictures, and prints what was found.

    Raises:
        UserError: for anything the user can put right; nothing is written then.
        KeyboardInterrupt: after Ctrl-C, with the way to go on as its message.
    """
    given = _parser().parse_args(argv)
    out = Path(given.output_dir)
    output.check_writable(out)
    try:
        record = _measure(given, shlex.join(["lfu", "evaluate", *argv]))
    except KeyboardInterrupt as stop:
        how = "" if given.no_cache else "Finished tasks are kept: the same command goes on from there."
        raise KeyboardInterrupt(how) from stop
    _write(record, given, out)
    return 0


def _parser() -> argparse.ArgumentParser:
    from lfu.cli.probes.models import HELP

    parser = LineParser(
        prog="lfu evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("models", nargs="+", metavar="MODEL", help=HELP)
    parser.add_argument(
        "--base", metavar="MODEL",
        help="the untouched model, or the label of one of the given models; forgetting is counted against it "
        "(default: the base of the adapters given, if they share one; none: no comparison)",
    )  # fmt: skip
    what = parser.add_argument_group("what")
    what.add_argument(
        "--categories", default="paper", metavar="FILE",
        help="task categories: paper, multilingual, or a YAML file (default: %(default)s)",
    )  # fmt: skip
    what.add_argument(
        "--tasks", metavar="A,B", help="only these tasks or categories, or further tasks of lm-evaluation-harness"
    )
    what.add_argument(
        "--data_dir", metavar="DIR",
        help="take the items from files in this folder (gsm8k/test.jsonl, ...; see docs/evaluation.md)",
    )  # fmt: skip
    what.add_argument(
        "--allow_hub", action="store_true", help="with --data_dir: fetch tasks that have no files from the hub"
    )  # fmt: skip
    what.add_argument("--limit", type=at_least_one, metavar="N", help="use only the first N items of each task")
    what.add_argument(
        "--num_fewshot", type=not_negative, metavar="N",
        help="worked examples per prompt, if the task can have them (default: each task's own number)",
    )  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument(
        "--batch_size", type=at_least_one, default=8, metavar="N", help="requests per forward pass (default: 8)"
    )
    how.add_argument(
        "--max_length", type=at_least_one, metavar="N",
        help="longest input in tokens; a longer one loses its beginning (default: the model's limit)",
    )  # fmt: skip
    how.add_argument(
        "--apply_chat_template", action="store_true", help="put prompts into the tokenizer's chat template"
    )
    how.add_argument(
        "--seed", type=not_negative, default=1234, metavar="N",
        help="seed for worked examples and intervals (default: 1234, the harness's)",
    )  # fmt: skip
    how.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float16", "float32"],
        help="load the weights as this type (default: float32 on a CPU, as stored on a GPU)",
    )  # fmt: skip
    how.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    how.add_argument("--no_cache", action="store_true", help="score everything again, and keep nothing for later")
    how.add_argument(
        "--output_dir", default="runs/evaluate", metavar="DIR",
        help="folder for record and report; those of an earlier evaluation are replaced (default: %(default)s)",
    )  # fmt: skip
    return parser


# --- before anything is measured -------------------------------------------------------------------------------------


def _with_base(models: dict[str, str], wanted: str | None) -> tuple[dict[str, str], str | None]:
    """(label -> name with the base in front, the base's label or None)."""
    if wanted == "none":
        return models, None
    name = wanted or _shared_base(models)
    if name is None:
        return models, None
    label = name if name in models else next((one for one, other in models.items() if _same(other, name)), None)
    if label is None:
        label = "base"
        if label in models:
            raise UserError(f"the label base is the untouched model's ({name}): call {models[label]} something else")
        models = {label: name, **models}
    return {label: models[label], **models}, label


def _shared_base(models: dict[str, str]) -> str | None:
    """The base of the adapters given, if they have one in common and any other model given is that base."""
    from lfu.model.embedded import embedded_name
    from lfu.model.loading import adapter_base, is_adapter

    adapters = [name for name in models.values() if is_adapter(name)]
    bases = {adapter_base(name) for name in adapters}
    if len(bases) != 1:
        return None
    base = embedded_name(next(iter(bases))) or next(iter(bases))
    return base if all(name in adapters or _same(name, base) for name in models.values()) else None


def _same(one: str, two: str) -> bool:
    """Whether two names stand for one model: the same name, or the same folder."""
    first, second = Path(one).expanduser(), Path(two).expanduser()
    return one == two or (first.exists() and second.exists() and first.samefile(second))


def _categories(given: argparse.Namespace) -> Any:
    from lfu.evaluation import categories

    found = categories.load(given.categories)
    if given.tasks is None:
        return found
    return categories.select(found, [name.strip() for name in given.tasks.split(",") if name.strip()])


def _data_dir(given: argparse.Namespace) -> Path | None:
    if given.data_dir is None:
        return None
    folder = Path(given.data_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"--data_dir {folder}: no such folder")
    return folder


# --- measuring -------------------------------------------------------------------------------------------------------


def _measure(given: argparse.Namespace, command: str) -> dict[str, Any]:
    from lfu.cli.probes.models import labelled, tokenizers, with_model

    names, base = _with_base(labelled(given.models), given.base)
    categories, data_dir = _categories(given), _data_dir(given)
    for label, tokenizer in tokenizers(names, given).items():
        if given.apply_chat_template and not getattr(tokenizer, "chat_template", None):
            raise UserError(f"{label} has no chat template: leave --apply_chat_template out")

    from lfu.evaluation.harness import Settings
    from lfu.evaluation.record import make_record
    from lfu.evaluation.suite import assemble, plan, score

    todo = plan(
        categories, data_dir=data_dir, allow_hub=given.allow_hub, num_fewshot=given.num_fewshot, say=_say
    )  # fmt: skip
    for one in todo.missing:
        _say(f"missing: {one.name}: {one.why}")
    settings = Settings(given.limit, given.batch_size, given.max_length, given.apply_chat_template, given.seed)
    board = _board(len(names) * len(todo.tasks))
    with board:
        outcomes = {
            label: with_model(
                name,
                given,
                lambda model, tokenizer: score(
                    label,  # noqa: B023  # called at once
                    model,
                    tokenizer,
                    todo,
                    settings=settings,
                    name=name,  # noqa: B023
                    use_cache=not given.no_cache,
                    watch=board,
                ),
            )
            for label, name in names.items()
        }
    return make_record(
        "evaluate",
        models={label: outcome.description for label, outcome in outcomes.items()},
        settings={
            "base": base or "none",
            "categories": f"{given.categories}: {categories.about}",
            "tasks": given.tasks or "all",
            "data": f"local files in {given.data_dir}" if given.data_dir else "the hub",
            "limit": given.limit or "none",
            "num_fewshot": "each task's own" if given.num_fewshot is None else given.num_fewshot,
            "batch_size": given.batch_size,
            "max_length": given.max_length or "the model's own",
            "apply_chat_template": given.apply_chat_template,
            "same with the harness alone": _by_hand(given, todo, list(names.values())[-1]),
        },
        results=assemble(todo, outcomes, base=base, seed=given.seed),
        command=command,
        seed=given.seed,
    )


def _by_hand(given: argparse.Namespace, todo: Any, model: str) -> str:
    """The harness's own command for a model: its figures must be the same."""
    from lfu.model.embedded import EMBEDDED, embedded_folder
    from lfu.model.loading import adapter_base, is_adapter

    whole = adapter_base(model) if is_adapter(model) else model
    arguments = [f"pretrained={embedded_folder(whole) if whole in EMBEDDED else whole}"]
    arguments += [f"peft={model}"] if is_adapter(model) else []
    arguments += [f"dtype={_dtype(given)}"]
    arguments += [f"max_length={given.max_length}"] if given.max_length else []
    arguments += ["trust_remote_code=True"] if given.trust_remote_code else []
    words = ["lm_eval", "--model", "hf", "--model_args", ",".join(arguments)]
    words += ["--include_path", str(Path(given.output_dir) / DEFINITIONS)] if given.data_dir else []
    words += ["--tasks", ",".join(todo.tasks)]
    for flag in ("limit", "num_fewshot"):
        if getattr(given, flag) is not None:
            words += [f"--{flag}", str(getattr(given, flag))]
    words += ["--apply_chat_template"] if given.apply_chat_template else []
    return shlex.join([*words, "--batch_size", str(given.batch_size), "--seed", str(given.seed)])


def _dtype(given: argparse.Namespace) -> str:
    """What `with_model` loads the weights as."""
    import torch

    return given.dtype or ("auto" if torch.cuda.is_available() else "float32")


def _say(text: str) -> None:
    print(f"lfu evaluate: {text}", file=sys.stderr)


def _board(total: int) -> Any:
    """Progress on stderr: a bar on a terminal, and a line for each finished task."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from lfu.evaluation.suite import Watch

    class Board(Watch):
        def __init__(self) -> None:
            self.finished = 0
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
            console = Console(stderr=True)
            self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
            self.row = self.bar.add_task("", total=None)

        def __enter__(self) -> Board:
            self.bar.start()
            return self

        def __exit__(self, *error: object) -> None:
            self.bar.stop()

        def starts(self, label: str, task: str) -> None:
            self.bar.reset(self.row, total=None, description=escape(f"[{self.finished + 1}/{total}] {label}: {task}"))

        def advances(self, done: int, of: int) -> None:
            self.bar.update(self.row, completed=done, total=of)

        def ends(self, label: str, task: str, how: str, seconds: float) -> None:
            self.finished += 1
            line = f"[{self.finished}/{total}] {label}: {task}: {how}, {seconds:.0f} s"
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    return Board()


# --- what the user reads ---------------------------------------------------------------------------------------------


def _write(record: dict[str, Any], given: argparse.Namespace, out: Path) -> None:
    from lfu.evaluation.tasks import write_definitions
    from lfu.evaluation.tasks.local import LOCAL

    output.write_and_show(record, out)
    if data_dir := _data_dir(given):
        local = [name for name, row in record["results"]["tasks"].items() if not row["source"].startswith("hub")]
        write_definitions(out / DEFINITIONS, [name for name in local if name in LOCAL], data_dir)
