"""Categories of tasks: YAML files like `categories/paper.yaml`, or one's own.

about: what this is                    # optional
categories:
  Math:
    - mathqa                           # a task, group or tag of lm-evaluation-harness
    - {task: gsm8k, metric: "exact_match,strict-match"}
  Reasoning:
    - {name: arc, tasks: [arc_easy, arc_challenge]}   # their mean counts as one
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lfu.support.errors import UserError, did_you_mean, value_errors_are_the_users
from lfu.support.files import named_yaml, read_yaml

FOLDER = Path(__file__).parent / "categories"
OTHER = "Other tasks"  # the category of tasks that were asked for and stand in none


@dataclass(frozen=True)
class Entry:
    """What counts as one in the average of its category: a task, or the mean of several."""

    name: str
    tasks: tuple[str, ...]
    metric: str | None = None  # `acc_norm`, or with the filter, `exact_match,strict-match`; None: see `main_metric`


@dataclass(frozen=True)
class Categories:
    """Named groups of entries."""

    name: str  # of the file
    about: str  # what it says about itself
    entries: Mapping[str, tuple[Entry, ...]]  # of each category
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # names of entries that `select` took out

    @property
    def tasks(self) -> list[str]:
        """All tasks, each once."""
        return [task for entries in self.entries.values() for entry in entries for task in entry.tasks]


def shipped() -> dict[str, Path]:
    """The shipped files by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def load(name: str) -> Categories:
    """The categories of a shipped file's name, or of a path.

    Raises UserError: no such file, or one that isn't as this module's docstring has it; the message names the place.
    """
    path = named_yaml(name, shipped(), "categories")
    content = read_yaml(path, "categories")
    with value_errors_are_the_users(f"categories {path}"):
        return _parsed(path.stem, content)


def select(categories: Categories, wanted: Iterable[str]) -> Categories:
    """Only the entries or tasks that are wanted, by category, entry or task name; others are put under `OTHER`.

    Raises UserError: nothing is wanted, or a name is wanted twice.
    """
    names = list(wanted)
    if not names:
        raise UserError("--tasks: name at least one task")
    if doubled := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--tasks: {doubled[0]} is named twice")
    kept: dict[str, tuple[Entry, ...]] = {}
    left_out: dict[str, tuple[str, ...]] = {}
    known: set[str] = set()
    for category, entries in categories.entries.items():
        taken = []
        for entry in entries:
            if {category, entry.name} & set(names):
                taken.append(entry)
            elif some := [task for task in entry.tasks if task in names]:
                # A part of a mean stands for itself.
                taken += [replace(entry, name=task, tasks=(task,)) for task in some]
            known |= {category, entry.name, *entry.tasks}
        if taken:
            kept[category] = tuple(taken)
            left_out[category] = tuple(entry.name for entry in entries if entry not in taken)
    if others := [name for name in names if name not in known]:
        kept[OTHER] = tuple(Entry(name, (name,)) for name in others)
    return replace(categories, entries=kept, left_out=left_out)


def main_metric(available: Collection[str], wanted: str | None = None) -> str:
    """Which of the harness's metrics (`acc_norm,none`) counts: the one that is `wanted`, with its filter or without.

    By default acc_norm, else acc, exact_match, f1, else the first one.

    Raises ValueError: the wanted one isn't there, or nothing is.
    """
    if not available:
        raise ValueError("the task has no metric that is a mean of numbers from 0 to 1, the more the better")
    names = [wanted] if wanted else ["acc_norm", "acc", "exact_match", "f1"]
    found = [metric for name in names for metric in available if name in (metric, metric.partition(",")[0])]
    if wanted and not found:
        raise ValueError(f"no metric {wanted!r}: choose one of {', '.join(available)}")
    return [*found, *available][0]


def _parsed(name: str, content: Any) -> Categories:
    if not isinstance(content, dict) or not isinstance(content.get("categories"), dict) or not content["categories"]:
        raise ValueError("must be a mapping with `categories:`, which maps each category to a list of tasks")
    _only(content, ("about", "categories"), "at the top")
    entries = {}
    for category, listed in content["categories"].items():
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"category {category!r} must be a list of tasks (- gsm8k)")
        entries[str(category)] = tuple(_entry(str(category), item) for item in listed)
    found = Categories(name, str(content.get("about") or name), entries)
    listed = {"task": found.tasks, "entry": [entry.name for each in entries.values() for entry in each]}
    for kind, names in listed.items():
        if doubled := [one for one in names if names.count(one) > 1]:
            raise ValueError(f"{kind} {doubled[0]!r} is listed twice")
    return found


def _entry(category: str, item: Any) -> Entry:
    where = f"category {category!r}"
    is_name = lambda value: isinstance(value, str) and bool(value.strip())
    if is_name(item):
        return Entry(item.strip(), (item.strip(),))
    if not isinstance(item, dict):
        raise ValueError(f"{where}: {item!r} is neither a task's name nor a mapping like {{task: gsm8k, metric: acc}}")
    _only(item, ("name", "task", "tasks", "metric"), f"in {where}")
    if ("task" in item) == ("tasks" in item):
        raise ValueError(f"{where}: give either task or tasks in {item!r}")
    tasks = item.get("tasks", [item.get("task")])
    if not isinstance(tasks, list) or not tasks or not all(map(is_name, tasks)):
        raise ValueError(f"{where}: tasks must be a list of names, got {tasks!r}")
    if "tasks" in item and "name" not in item:
        raise ValueError(f"{where}: the mean of {', '.join(tasks)} needs a name")
    name, metric = item.get("name", tasks[0]), item.get("metric")
    if not isinstance(name, str) or not isinstance(metric, str | None):
        raise ValueError(f"{where}: name and metric must be text in {item!r}")
    return Entry(name, tuple(tasks), metric)


def _only(given: Mapping[Any, Any], known: Collection[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"unknown key {key!r} {where}.{did_you_mean(str(key), known)}")
