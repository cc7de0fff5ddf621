"""The data that a probe is given: questions and texts from a file, the hub, or the built-in sets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lfu.cli.probes import Probe
from lfu.data.shapes import SYSTEMS
from lfu.data.turns import text_of
from lfu.support.errors import UserError, did_you_mean, value_errors_are_the_users
from lfu.support.flags import option
from lfu.support.words import tell

Row = dict[str, Any]

QUESTIONS = ("question", "prompt", "instruction", "goal")
ANSWERS = ("answer", "response", "completion", "output", "target")

say_once = cache(lambda line: tell(f"lfu probe: {line}"))  # every model gets the same rows

HOUSE_RULE = "house_rule"
HELD_OUT = ("requests", "ordinary")


def data(default: str) -> Any:
    """`--data`."""
    return option(None, f"{default}; or a file, a folder, or a hub name", metavar="DATA")


def texts(more: str = "") -> Any:
    """`--texts`."""
    return option(None, f"rows with a column text{more} (default: 40 built-in passages of prose)", metavar="FILE")


@dataclass(kw_only=True)
class OfQuestions(Probe):
    """A probe that asks the questions of `data`."""

    data: str | None = data("questions with answers (default: 100 built-in word problems)")
    data_split: str | None = option(None, "split of --data (default: test)", metavar="SPLIT")
    data_config: str | None = option(None, "configuration of a hub data set", metavar="NAME")

    def __post_init__(self) -> None:
        given = [name for name in ("data_split", "data_config") if getattr(self, name) is not None]
        if given and self.data is None:
            raise UserError(f"--{given[0]} says which part of --data is read, and there is no --data: give it, too")
        if given:
            from lfu.data.load import check_part

            check_part(str(self.data), "data_", given)

    def loaded(self) -> Any:
        """The data set of --data."""
        from lfu.data.load import load_rows

        return load_rows(str(self.data), split=self.data_split or "test", config=self.data_config, limit=self.limit)

    def choices(self) -> list[Row]:
        """`{"question", "choices", "answer"}` rows; by default the built-in general knowledge."""
        from lfu.data.probes import general_knowledge

        return general_knowledge()[: self.limit] if self.data is None else _choices(self.loaded(), f"data {self.data}")

    def questions(self) -> Any:
        """The data set of --data; by default built-in word problems."""
        if self.data is not None:
            return self.loaded()
        from datasets import Dataset

        from lfu.data.word_problems import word_problems

        return Dataset.from_list(word_problems("test", min(100, self.limit or 100)))

    @property
    def source(self) -> str:
        """What --data is called in the record."""
        return self.data or "built-in word problems"


def as_trained(dataset: Any, where: str, template: str, tokenizer: Any) -> tuple[list[Row], Any]:
    """Rows with answers, and the `render` that puts them to a model: as `lfu train` would, where it takes such rows.

    Other columns, such as prompt and response, are read as questions and answers.
    """
    from lfu.data.shapes import shape_of
    from lfu.data.templates import to_training_rows
    from lfu.evaluation.pieces import render_of
    from lfu.study.rows import pair_of

    try:
        shape = shape_of(list(dataset), dataset.column_names, "text")
    except UserError:  # none that can be trained on
        shape = None
    if shape is None or shape.columns == ("text",):
        return pairs_of(dataset, where), render_of(tokenizer, template)
    if shape.own and template != "auto":
        raise UserError(f"--template is for questions, and {where} has {' and '.join(shape.columns)}: drop it")
    with value_errors_are_the_users(where):
        return list(to_training_rows(dataset, template=template, tokenizer=tokenizer, tell=say_once)), pair_of


def question_rows(dataset: Any, where: str) -> list[Row]:
    """The rows of a data set as `{"question", "answer"}`, or as multiple choice with `choices`."""
    if {"question", "choices"} <= set(dataset.column_names):
        return _choices(dataset, where)
    if {"prompt", "completion"} <= set(dataset.column_names):
        say_once(f"note: {where}: prompts are asked as questions; lfu train takes prompt and completion as they are")
    return pairs_of(dataset, where)


def pairs_of(dataset: Any, where: str, *, answers: bool = True) -> list[Row]:
    """`{"question", "answer"}` rows, the texts as they are; what `input` holds is put behind the question.

    Without `answers` those are empty. `where`: what the set is called, for messages.
    """
    known = {"question": QUESTIONS} | ({"answer": ANSWERS} if answers else {})
    columns = {key: _column(dataset, names, where) for key, names in known.items()}
    beside = ("input", "context") if columns["question"] == "instruction" else ()
    more = [name for name in beside if name in dataset.column_names]
    pairs = []
    for number, row in enumerate(dataset, start=1):
        with value_errors_are_the_users(f"{where}, row {number}"):
            pair = {key: text_of(row[column], f"column {column!r}") for key, column in columns.items()}
            extra = text_of(row[more[0]], f"column {more[0]!r}") if more else ""
        if blank := [key for key, text in pair.items() if not text.strip()]:
            raise UserError(f"{where}, row {number} has no {blank[0]}: fill or remove it")
        pairs.append({"answer": ""} | pair | ({"question": f"{pair['question']}\n\n{extra}"} if extra.strip() else {}))
    left = [name for name in (*SYSTEMS, "history") if name in dataset.column_names and any(dataset[name])]
    if left:
        say_once(f"warning: {where}: only questions are asked, so what the columns {', '.join(left)} hold is left out")
    return pairs


def _column(dataset: Any, known: Sequence[str], where: str) -> str:
    names = dataset.column_names
    if found := next((name for name in known if name in names), None):
        return found
    raise UserError(f"{where}: no column of {known[0]}s among {', '.join(names)}; accepted: {', '.join(known)}")


def texts_of(name: str | None, limit: int | None) -> list[str]:
    """The column text of a file; by default the built-in prose."""
    from lfu.data.load import load_rows
    from lfu.data.probes import plain_text

    if name is None:
        return [row["text"] for row in plain_text()][:limit]
    dataset = load_rows(name, limit=limit)
    if "text" not in dataset.column_names:
        raise UserError(f"texts {name}: columns {', '.join(dataset.column_names)}; needed is one called text")
    found = list(dataset["text"])
    for number, text in enumerate(found, start=1):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"texts {name}: row {number} has no text: fill or remove it")
    return found


def _choices(dataset: Any, where: str) -> list[Row]:
    from lfu.evaluation.forgetting import choice_rows

    with value_errors_are_the_users(where):
        return choice_rows(dataset)


def same_tokens(tokenizers: Mapping[str, Any], read: Callable[[Any], Any]) -> None:
    """Raises UserError unless all models `read` the same tokens as the first, the base: else they can't be compared."""
    (base, wanted), *others = ((label, read(tokenizer)) for label, tokenizer in tokenizers.items())
    for label, found in others:
        if found != wanted:
            raise UserError(
                f"{label} and {base} have different vocabularies, so what they make of a text can't be compared: give "
                "the model that it was fine-tuned from"
            )


def load_sets(specs: Mapping[str, str | None], limit: int | None) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """(the four sets by flag, built-in where none is given; their names for the record). `limit`: of held-out ones."""
    found: dict[str, list[Row]] = {}
    for name, spec in specs.items():
        if spec is None and name == "ordinary" and specs["requests"] is not None:
            found[name] = []  # the built-in questions say nothing about another alignment's over-refusal
        else:
            found[name] = load_pairs(spec or HOUSE_RULE, name)[: limit if name in HELD_OUT else None]
    return found, {name: f"{spec or HOUSE_RULE} ({len(found[name])})" for name, spec in specs.items()}


def load_pairs(spec: str, which: str) -> list[Row]:
    """`{"question", "answer"}` rows of the DATA[,KEY=VALUE...] of flag `which`; of held-out sets without answers."""
    from datasets import Dataset

    from lfu.data.load import load_rows
    from lfu.data.probes import house_rule

    argument = f"--{which}"
    name, options = _split_spec(spec, argument)
    limit = options.pop("limit", "")
    if limit and not (limit.isdecimal() and int(limit)):
        raise UserError(f"{argument}: limit must be a whole number from 1, got {limit!r}")
    if name == HOUSE_RULE:
        data = Dataset.from_list(house_rule(which))
    else:
        data = load_rows(name, split=options.pop("split", "train"), config=options.pop("config", None))
    for column in options:
        if column not in data.column_names:
            raise UserError(f"{argument}: there is no column {column!r}.{did_you_mean(column, data.column_names)}")
    matches = lambda row: all(str(row[key]).casefold() == value.casefold() for key, value in options.items())
    kept = [number for number, row in enumerate(data) if matches(row)][: int(limit) if limit else None]
    if not kept:
        wanted = ", ".join(f"{key}={value}" for key, value in options.items())
        raise UserError(f"{argument} {name}: no row has {wanted}")
    return pairs_of(data.select(kept), f"{argument} {name}", answers=which not in HELD_OUT)


def _split_spec(spec: str, argument: str) -> tuple[str, dict[str, str]]:
    """(name, options) of DATA[,KEY=VALUE...]. A path that exists is never split."""
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
