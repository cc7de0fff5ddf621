"""Score models on many tasks with lm-evaluation-harness, by category, and show what each gained and forgot.

By default: the eleven tasks of the LfU paper in their four categories, from the hub; with --data_dir the same tasks
from local files. A task that is not available is named as missing, and never averaged away. Finished tasks are kept,
and the same command continues where it was stopped."""

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lfu.cli import models, output
from lfu.cli.progress import bar
from lfu.support.errors import UserError
from lfu.support.flags import argument, at_least_one, flag, not_negative, read, switch
from lfu.support.words import listed, tell

DEFINITIONS = "tasks"  # folder below --output_dir


@dataclass(kw_only=True)
class Evaluate(models.Loading):
    """The flags of `lfu evaluate`."""

    models: list[str] = argument("MODEL", models.HELP, nargs="+")
    base: str | None = flag(
        "", None, "the untouched model, or the label of one of the given models; forgetting is counted against it "
        "(default: the base of the adapters given, if they share one; none: no comparison)", metavar="MODEL",
    )  # fmt: skip
    categories: str = flag("what", "paper", "categories: paper (default), multilingual, or a YAML file", metavar="FILE")
    tasks: str | None = flag("what", None, "only these tasks or categories, or others of the harness", metavar="A,B")
    data_dir: str | None = flag(
        "what", None, "take the items from files in this folder (gsm8k/test.jsonl, ...; see docs/evaluation.md)",
        metavar="DIR",
    )  # fmt: skip
    allow_hub: bool = switch("what", "with --data_dir: fetch tasks that have no files from the hub")
    limit: int | None = flag("what", None, "use only the first N items of each task", type=at_least_one)
    num_fewshot: int | None = flag(
        "what", None, "worked examples per prompt, if the task can have them (default: each task's own number)",
        type=not_negative,
    )  # fmt: skip
    batch_size: int = flag("how", 8, "requests per forward pass", type=at_least_one)
    max_length: int | None = flag(
        "how", None, "longest input in tokens; a longer one loses its beginning (default: the model's limit)",
        type=at_least_one,
    )  # fmt: skip
    apply_chat_template: bool = switch("how", "put prompts into the tokenizer's chat template")
    seed: int = flag(
        "how", 1234, "seed for worked examples and intervals (default: 1234, the harness's)", type=not_negative
    )
    no_cache: bool = switch("how", "score everything again, and keep nothing for later")
    output_dir: str = flag(
        "how", "runs/evaluate", "folder for record and report; those of an earlier evaluation are replaced (default: "
        "runs/evaluate)", metavar="DIR",
    )  # fmt: skip


def run(argv: list[str]) -> int:
    """Scores, writes record.json, index.html, report.md and pictures, and prints what was found."""
    given = read(Evaluate, "lfu evaluate", __doc__, argv)
    if given.allow_hub and not given.data_dir:
        raise UserError("--allow_hub goes with --data_dir: without it every task comes from the hub")
    out = Path(given.output_dir)
    output.check_writable(out)
    from lfu.evaluation.tasks import write_definitions
    from lfu.evaluation.tasks.local import LOCAL

    try:
        record = _measure(given, shlex.join(["lfu", "evaluate", *argv]))
    except KeyboardInterrupt as stop:
        how = "" if given.no_cache else "Finished tasks are kept: the same command continues from there."
        raise KeyboardInterrupt(how) from stop
    output.write_and_show(record, out)
    if given.data_dir:  # the tasks with local files, defined for the harness's own command
        local = [name for name, row in record["results"]["tasks"].items() if not row["source"].startswith("hub")]
        data_dir = Path(given.data_dir).expanduser()
        write_definitions(out / DEFINITIONS, [name for name in local if name in LOCAL], data_dir)
    return 0


def _with_base(models: dict[str, str], wanted: str | None) -> tuple[dict[str, str], str | None]:
    """(label -> name with the base in front, the base's label or None)."""
    name = None if wanted == "none" else wanted or _shared_base(models)
    if name is None:
        return models, None
    label = name if name in models else next((one for one, other in models.items() if _same(other, name)), None)
    if label is not None:
        return {label: models[label], **models}, label
    if "base" in models:
        raise UserError(f"the label base is the untouched model's ({name}): call {models['base']} something else")
    return {"base": name, **models}, "base"


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
    return Path(one).expanduser().resolve() == Path(two).expanduser().resolve()


def _measure(given: Evaluate, command: str) -> dict[str, Any]:
    from lfu.evaluation.categories import load, select

    names, base = _with_base(models.labelled(given.models), given.base)
    categories = load(given.categories)
    if given.tasks is not None:
        categories = select(categories, listed(given.tasks))
    data_dir = None if given.data_dir is None else Path(given.data_dir).expanduser()
    if data_dir and not data_dir.is_dir():
        raise UserError(f"--data_dir {data_dir}: no such folder")
    for label, tokenizer in given.tokenizers(names).items():
        if given.apply_chat_template and not getattr(tokenizer, "chat_template", None):
            raise UserError(f"{label} has no chat template: leave --apply_chat_template out")

    from lfu.evaluation.harness import Settings
    from lfu.evaluation.record import make_record
    from lfu.evaluation.results import assemble
    from lfu.evaluation.suite import plan, score

    todo = plan(categories, data_dir=data_dir, allow_hub=given.allow_hub, num_fewshot=given.num_fewshot, say=_say)
    for task, why in todo.missing.items():
        _say(f"missing: {task}: {why}")
    settings = Settings(given.limit, given.batch_size, given.max_length, given.apply_chat_template, given.seed)
    outcomes: dict[str, Any] = {}
    with bar() as drawn:
        board = Board(drawn, len(names) * len(todo.tasks))
        for label, name in names.items():
            more: dict[str, Any] = {"settings": settings, "name": name, "use_cache": not given.no_cache, "watch": board}
            outcomes[label] = given.with_model(name, partial(score, label, plan=todo, **more))
    described = {label: outcome.description for label, outcome in outcomes.items()}
    models.tell_of_dtypes(described)
    return make_record(
        "evaluate",
        models=described,
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


def _by_hand(given: Evaluate, todo: Any, model: str) -> str:
    """The harness's own command for a model, which gives the same figures."""
    from lfu.model.embedded import EMBEDDED, embedded_folder
    from lfu.model.loading import adapter_base, is_adapter

    whole = adapter_base(model) if is_adapter(model) else model
    arguments = {
        "pretrained": embedded_folder(whole) if whole in EMBEDDED else whole,
        "peft": model if is_adapter(model) else None,
        "tokenizer": model if is_adapter(model) and (Path(model) / "tokenizer_config.json").is_file() else None,
        "dtype": given.torch_dtype,
        "max_length": given.max_length,
        "trust_remote_code": given.trust_remote_code or None,
    }
    flags = {
        "model_args": ",".join(f"{name}={value}" for name, value in arguments.items() if value is not None),
        "include_path": Path(given.output_dir) / DEFINITIONS if given.data_dir else None,
        "tasks": ",".join(todo.tasks),
        "limit": given.limit,
        "num_fewshot": given.num_fewshot,
        "batch_size": given.batch_size,
        "seed": given.seed,
    }
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    return shlex.join(["lm_eval", "--model", "hf", *words, *["--apply_chat_template"] * given.apply_chat_template])


def _say(text: str) -> None:
    tell(f"lfu evaluate: {text}")


class Board:
    """A `Watch` on stderr: on a terminal `bar` shows the task at hand, and each finished task gets a line."""

    def __init__(self, bar: Any, tasks: int) -> None:
        self.bar, self.tasks, self.number = bar, tasks, 0
        self.row = bar.add_task("", total=None)

    def starts(self, label: str, task: str) -> None:
        from rich.markup import escape

        self.number += 1
        self.bar.reset(self.row, total=None, description=escape(f"[{self.number}/{self.tasks}] {label}: {task}"))

    def advances(self, done: int, total: int) -> None:
        self.bar.update(self.row, completed=done, total=total)

    def ends(self, label: str, task: str, how: str, seconds: float) -> None:
        line = f"[{self.number}/{self.tasks}] {label}: {task}: {how}, {seconds:.0f} s"
        self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
