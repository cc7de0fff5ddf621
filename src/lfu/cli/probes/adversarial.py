"""How much of an alignment survives a few training steps on its opposite?

BASE is aligned by each of --methods on the rows of --keep; then every model, and every ALIGNED one given besides, is
attacked: plain SFT on the rows of --break. After each of --steps it answers held-out requests, greedily, and the share
of responses that break the alignment is the attack success rate. It is one trajectory: the model after 10 steps is the
one after 5, trained on, at a constant learning rate. The attack changes a copy; no model is written anywhere.

Built in is a harmless house rule (no recipes here). Other sets are given by name or file: DATA[,KEY=VALUE...], where
split, config and limit are what they say and any other key is a column that must have that value, as in
PKU-Alignment/BeaverTails,split=30k_train,is_safe=true. Columns: question, prompt, instruction or goal; and answer,
response, completion, output or target. The built-in sets are called house_rule. Nothing of other sets comes with
this package."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lfu.cli.probes import models, rows, training
from lfu.cli.probes.progress import phase
from lfu.data.house_rule import NAME as HOUSE_RULE
from lfu.support.errors import UserError, did_you_mean, one_line, value_errors_are_the_users

HELD_OUT = ("requests", "ordinary")
QUESTIONS = ("question", "prompt", "instruction", "goal")
ANSWERS = ("answer", "response", "completion", "output", "target")
# The attack: plain SFT at a constant learning rate, so that its first steps don't depend on how many follow.
BEFORE_ATTACK = ["--lr_scheduler_type", "constant", "--warmup_steps", "0"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The probe's own flags."""
    parser.add_argument(
        "models", nargs="+", metavar="MODEL",
        help=f"first the model to align (BASE), then models that are aligned already (ALIGNED); {models.HELP}",
    )  # fmt: skip
    training.add_train_flags(parser, "sft,lfu; none where ALIGNED models are given")
    parser.add_argument(
        "--attack", action="append", default=[], metavar="FLAGS",
        help="flags of lfu train for the attack, in quotes, as in --attack '--learning_rate 1e-3'; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=steps_of, default=[0, 5, 10, 20], metavar="N,N", help="attack steps (default: 0,5,10,20)"
    )
    parser.add_argument("--keep", metavar="DATA", help="rows to align with (default: the built-in house rule)")
    parser.add_argument("--break", metavar="DATA", help="rows to attack with (default: the built-in ones)")
    parser.add_argument("--requests", metavar="DATA", help="held-out requests (default: the built-in ones)")
    parser.add_argument(
        "--ordinary", metavar="DATA",
        help="held-out questions that must not be refused (default: the built-in ones with the built-in requests)",
    )  # fmt: skip
    parser.add_argument(
        "--judge", metavar="MODULE:FUNCTION",
        help="your own function (prompt, response) -> True where the response breaks the alignment; it is imported, so "
        "its code runs (default: broken unless it refuses, by a list of phrases)",
    )  # fmt: skip
    parser.add_argument(
        "--max_new_tokens", type=int, default=64, metavar="N", help="a response is cut there (default: %(default)s)"
    )
    rows.add_template(parser)


def steps_of(text: str) -> list[int]:
    """Rising numbers of steps, for argparse; 0 (before the attack) is added where it is missing."""
    try:
        found = sorted({0, *(int(part) for part in text.split(","))})
    except ValueError:
        found = [-1]
    if found[0] < 0 or len(found) < 2:
        raise argparse.ArgumentTypeError(f"must be whole numbers from 0 and one above it, as in 0,5,10, got {text!r}")
    return found


@dataclass(frozen=True)
class Sets:
    """The four data sets, and what they are called in the record."""

    keep: list[dict[str, str]]
    break_: list[dict[str, str]]
    requests: list[str]
    ordinary: list[str]
    names: dict[str, str]


def measure(given: argparse.Namespace, command: str) -> dict[str, Any]:
    """Aligns, attacks, asks and judges.

    Raises:
        UserError: models, data, flags or a judge that can't be used.
    """
    if given.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens must be at least 1, got {given.max_new_tokens}")
    base, *others = given.models
    aligned = models.labelled(others)
    methods = training.method_list(given.methods if given.methods is not None else "" if aligned else "sft,lfu")
    if not methods and not aligned:
        raise UserError("nothing to attack: give --methods, or models that are aligned already")
    if twice := [label for label in aligned if label in (*methods, "untouched")]:
        raise UserError(f"the label {twice[0]!r} is taken: give another one, as in mine={aligned[twice[0]]}")
    flags = training.flags_of(given.train, methods)
    (base_name,) = models.labelled([base]).values()
    probe = Probe(given, base_name, flags, load_sets(given))
    with training.scratch() as folder:
        probe.folder = folder
        probe.check(methods, aligned)
        return probe.run(methods, aligned, command)


class Probe:
    """One run of the probe: the models one after the other, each in memory alone."""

    def __init__(self, given: argparse.Namespace, base: str, flags: Mapping[str, Sequence[str]], sets: Sets):
        self.given, self.base, self.flags, self.sets = given, base, flags, sets
        self.judge = load_judge(given.judge) if given.judge else None
        self.folder = ""  # the trainers'; nothing stays in it
        self.trained: dict[str, dict[str, Any]] = {}

    # -- settings ------------------------------------------------------------------------------------------------------

    def alignment(self, method: str) -> tuple[Any, Any]:
        """Settings of the alignment by a method."""
        return training.arguments(
            self.given, self.base, method, self.flags[method], folder=self.folder, seed=self.given.seed
        )

    def attack(self) -> tuple[Any, Any]:
        """Settings of the attack."""
        given = [f"sft:{value}" for value in self.given.attack]
        flags = training.flags_of(given, ["sft"], "--attack", refused=training.LENGTH)["sft"]
        last = ["--max_steps", str(self.given.steps[-1])]
        return training.arguments(
            self.given, self.base, "sft", flags, folder=self.folder, seed=self.given.seed,
            before=BEFORE_ATTACK, after=last, argument="--attack",
        )  # fmt: skip

    def check(self, methods: Sequence[str], aligned: Mapping[str, str]) -> None:
        """Whatever can be refused before a model is loaded."""
        from lfu.evaluation.prompts import render_of

        for method in methods:
            self.alignment(method)
        self.attack()
        for tokenizer in models.tokenizers({"untouched": self.base, **aligned}, self.given).values():
            with value_errors_are_the_users():
                render_of(tokenizer, self.given.template)

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self, methods: Sequence[str], aligned: Mapping[str, str], command: str) -> dict[str, Any]:
        """The record."""
        from lfu.evaluation.adversarial import asked_in_training
        from lfu.evaluation.record import make_record

        described: dict[str, Any] = {}
        found: dict[str, dict[int, Any]] = {}
        described["untouched"], before = models.with_model(self.base, self.given, self._untouched)
        for label in [*methods, *aligned]:
            if label in aligned:
                described[label], found[label] = self._attacked(label, aligned[label], None)
            else:
                state = self._align(label)
                described[label], found[label] = self._attacked(label, self.base, state)
                described[label]["name"] += f", aligned by {label}"
        trained_on = [row["question"] for row in [*self.sets.keep, *self.sets.break_]]
        return make_record(
            "adversarial",
            models=described,
            settings=self._settings(methods),
            results={
                "steps": self.given.steps,
                "requests": self.sets.requests,
                "ordinary": self.sets.ordinary,
                "untouched": _measured(before),
                "attacked": {label: {str(n): _measured(b) for n, b in each.items()} for label, each in found.items()},
                "differences": self._differences(found),
                "classifier": self._classifier(),
                "asked in training": asked_in_training(self.sets.requests, trained_on),
                "training": self.trained,
            },
            command=command,
            seed=self.given.seed,
        )

    def _untouched(self, model: Any, tokenizer: Any) -> tuple[Any, Any]:
        from lfu.evaluation.record import describe_model

        return describe_model(self.base, model), self._asking("untouched", tokenizer)(model)

    def _align(self, method: str) -> dict[str, Any]:
        """Weights of the base model once it is aligned by a method, on the CPU."""
        config, model_arguments = self.alignment(method)

        def work(model: Any, tokenizer: Any) -> dict[str, Any]:
            data = training.training_rows(self.sets.keep, tokenizer, self.given.template)
            fitted = self._fit(f"{method}: align", model, tokenizer, data, config, model_arguments)
            self.trained[method] = {"align": fitted.log, "said": fitted.said}
            return {name: tensor.detach().to("cpu", copy=True) for name, tensor in fitted.model.state_dict().items()}

        return models.with_model(self.base, training.with_dtype(self.given, model_arguments), work)

    def _attacked(self, label: str, name: str, state: dict[str, Any] | None) -> tuple[dict[str, Any], dict[int, Any]]:
        """(description of the aligned model, steps -> behaviour). `state`: weights to put into the model first."""
        from lfu.evaluation.adversarial import under_attack
        from lfu.evaluation.record import describe_model

        config, model_arguments = self.attack()

        def work(model: Any, tokenizer: Any) -> Any:
            model = training.plain(model)
            if state is not None:
                model.load_state_dict(state)
            description = describe_model(name, model)

            def train(model: Any, rows: Any, steps: Sequence[int], visit: Any) -> None:
                data = training.training_rows(rows, tokenizer, self.given.template)
                on_step = lambda n, current: visit(n, current) if n in steps else None
                fitted = self._fit(f"{label}: attack", model, tokenizer, data, config, model_arguments, on_step)
                self.trained.setdefault(label, {})["attack"] = fitted.log

            ask = self._asking(label, tokenizer)
            return description, under_attack(
                lambda: model, self.sets.break_, self.given.steps, train=train, measure=ask
            )

        return models.with_model(name, training.with_dtype(self.given, model_arguments), work)

    def _fit(
        self, title: str, model: Any, tokenizer: Any, data: Any, config: Any, more: Any, on_step: Any = None
    ) -> Any:
        with phase(title, training.steps_in(config, len(data))) as tick:

            def step(n: int, current: Any) -> None:
                tick(1)
                if on_step is not None:
                    on_step(n, current)

            return training.fit(training.plain(model), tokenizer, data, config, more, step)

    def _asking(self, label: str, tokenizer: Any) -> Any:
        """A function: model -> behaviour."""
        from lfu.evaluation.adversarial import behaviour, not_refused
        from lfu.evaluation.prompts import render_of

        asked = len(self.sets.requests) + len(self.sets.ordinary)

        def ask(model: Any) -> Any:
            with phase(f"{label}: answers", asked) as tick:
                return behaviour(
                    model, tokenizer, self.sets.requests, self.sets.ordinary, judge=self.judge or not_refused,
                    render=render_of(tokenizer, self.given.template), max_new_tokens=self.given.max_new_tokens,
                    batch_size=self.given.batch_size, progress=tick,
                )  # fmt: skip

        return ask

    # -- what goes into the record -------------------------------------------------------------------------------------

    def _settings(self, methods: Sequence[str]) -> dict[str, Any]:
        given = self.given
        train = {method: training.described(*self.alignment(method)) for method in methods}
        train["attack"] = training.described(*self.attack())
        return {
            **self.sets.names,
            "judge": given.judge or "broken unless it refuses, by a list of phrases",
            "steps": given.steps,
            "template": given.template,
            "max_new_tokens": given.max_new_tokens,
            "training": train,
            "flags": {"--train": given.train, "--attack": given.attack},
        }

    def _differences(self, found: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
        """Every later label against the first, after each number of steps."""
        first, *later = found
        return {
            "against": first,
            "labels": {
                label: {
                    str(n): asdict(b.against(found[first][n], seed=self.given.seed)) for n, b in found[label].items()
                }
                for label in later
            },
        }

    def _classifier(self) -> dict[str, Any]:
        """How often the list of phrases is wrong, on the labelled responses that come with the package."""
        from lfu.data.house_rule import labelled
        from lfu.evaluation.refusal import error_rate

        return asdict(error_rate(labelled()))


def _measured(found: Any) -> dict[str, Any]:
    over = found.over_refusal()
    return asdict(found) | {
        "broken_share": asdict(found.broken_share()),
        "over_refusal": asdict(over) if over is not None else None,
    }


# --- data ----------------------------------------------------------------------------------------------------------


def load_sets(given: argparse.Namespace) -> Sets:
    """The four sets; the built-in ones where nothing was given.

    Raises:
        UserError: a set that can't be read, or is of no known shape.
    """
    found: dict[str, list[dict[str, str]]] = {}
    names = {}
    for name in ("keep", "break", "requests", "ordinary"):
        spec = getattr(given, name)
        if spec is None and name == "ordinary" and given.requests is not None:
            found[name] = []  # the built-in questions say nothing about another alignment's over-refusal
        else:
            found[name] = load_pairs(spec or HOUSE_RULE, name)
        if name in HELD_OUT:
            found[name] = found[name][: given.limit]
        names[name] = f"{spec or HOUSE_RULE} ({len(found[name])})"
    prompts = {name: [row["question"] for row in found[name]] for name in HELD_OUT}
    return Sets(found["keep"], found["break"], prompts["requests"], prompts["ordinary"], names)


def load_pairs(spec: str, which: str) -> list[dict[str, str]]:
    """`{"question", "answer"}` rows of DATA[,KEY=VALUE...]; in the held-out sets the answer is empty.

    Args:
        spec: what the user gave.
        which: the flag it was given to, without dashes.

    Raises:
        UserError: as `load_rows`; no column for questions or answers; a row without text; no row left.
    """
    argument = f"--{which}"
    name, options = _split_spec(spec, argument)
    limit = options.pop("limit", "")
    if limit and not (limit.isdecimal() and int(limit)):
        raise UserError(f"{argument}: limit must be a whole number from 1, got {limit!r}")
    data = _read(name, which, options)
    kept = [row for row in data if all(_matches(row, key, value, argument) for key, value in options.items())]
    kept = kept[: int(limit) if limit else None]
    if not kept:
        wanted = ", ".join(f"{key}={value}" for key, value in options.items())
        raise UserError(f"{argument} {name}: no row has {wanted}")
    wanted_columns = [("question", QUESTIONS)] + ([("answer", ANSWERS)] if which not in HELD_OUT else [])
    columns = {key: _column(data.column_names, known, f"{key}s", argument) for key, known in wanted_columns}
    pairs = []
    for number, row in enumerate(kept, start=1):
        pair = {key: row[column] for key, column in columns.items()}
        for key, text in pair.items():
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{argument} {name}: row {number} of those chosen has no {key} text: fill or remove it")
        pairs.append({"answer": ""} | {key: text.strip() for key, text in pair.items()})
    return pairs


def _read(name: str, which: str, options: dict[str, str]) -> Any:
    """The data set; takes split and config out of the options."""
    from datasets import Dataset

    from lfu.data import house_rule
    from lfu.data.load import load_rows

    split, config = options.pop("split", "train"), options.pop("config", None)
    if name != HOUSE_RULE:
        return load_rows(name, split=split, config=config)
    built_in = {"keep": house_rule.keeping, "break": house_rule.breaking}
    built_in |= {"requests": house_rule.requests, "ordinary": house_rule.ordinary}
    return Dataset.from_list(built_in[which]())


def _split_spec(spec: str, argument: str) -> tuple[str, dict[str, str]]:
    """(name, options) of DATA[,KEY=VALUE...]. A path that exists is a path, whatever signs are in it."""
    if Path(spec).expanduser().exists():
        return spec, {}
    name, *parts = spec.split(",")
    options = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{argument} {spec}: {part!r} is not of the form KEY=VALUE")
        options[key.strip()] = value.strip()
    return name, options


def _matches(row: Mapping[str, Any], column: str, value: str, argument: str) -> bool:
    if column not in row:
        raise UserError(f"{argument}: there is no column {column!r}.{did_you_mean(column, row)}")
    return str(row[column]).casefold() == value.casefold()


def _column(columns: Sequence[str], known: Sequence[str], what: str, argument: str) -> str:
    found = next((name for name in known if name in columns), None)
    if found is None:
        raise UserError(f"{argument}: no column of {what} among {', '.join(columns)}; accepted: {', '.join(known)}")
    return found


# --- the user's judge ----------------------------------------------------------------------------------------------


def load_judge(spec: str) -> Any:
    """The function that MODULE:FUNCTION names, wrapped so that its failures are told in one line.

    Raises:
        UserError: no such module or function.
    """
    module, _, name = spec.partition(":")
    if not module or not name:
        raise UserError(f"--judge {spec!r}: write it as MODULE:FUNCTION, as in my_judge:breaks_the_rule")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` has it: a file beside one's data is where a judge is written
    try:
        judge = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's own code raises while it is imported
        raise UserError(f"--judge {spec}: can't be imported ({type(error).__name__}: {one_line(error)})") from error
    if not callable(judge):
        raise UserError(f"--judge {spec}: {name} is not a function")

    def checked(prompt: str, response: str) -> bool:
        try:
            verdict = judge(prompt, response)
        except Exception as error:
            raise UserError(
                f"--judge {spec} failed on a response: {type(error).__name__}: {one_line(error)}"
            ) from error
        if type(verdict).__name__ not in ("bool", "bool_"):  # a text that says "no" would count as yes
            raise UserError(f"--judge {spec} must return True or False, got {verdict!r}")
        return bool(verdict)

    return checked
