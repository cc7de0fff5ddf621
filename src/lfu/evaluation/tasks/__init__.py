"""Which tasks can be run here: the harness's own definitions, over local files or over the hub."""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lfu.evaluation.batching import generators_kept
from lfu.evaluation.tasks import squad
from lfu.evaluation.tasks.local import LOCAL, Local, definition, harness_folder, own_settings
from lfu.evaluation.tasks.quiet import offline, quiet
from lfu.support.errors import UserError, did_you_mean, one_line
from lfu.support.files import write_text


@dataclass(frozen=True)
class Runnable:
    """A task with its items loaded."""

    name: str
    task: Any  # the harness's `Task`; a `Group` or a list of tasks where the name stands for several
    source: str  # where the items come from, to be read by people
    override: int | None = None  # worked examples to put in every prompt; None: the task's own number

    @property
    def leaves(self) -> list[Any]:
        """The single tasks."""
        return _leaves(self.task)

    @property
    def num_fewshot(self) -> int:
        """Worked examples in each prompt; for several tasks the largest number."""
        own = max(leaf.get_config("num_fewshot") or 0 for leaf in self.leaves)
        return own if self.override is None else self.override


def find(
    names: Iterable[str], *, data_dir: Path | None = None, allow_hub: bool = False, num_fewshot: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Runnable], dict[str, str]]:  # fmt: skip
    """Loads the tasks of these names and their items.

    Args:
        names: names of the harness: tasks, groups or tags.
        data_dir: take the items from files in this folder (see `local.LOCAL`). Without it they come from the hub.
        allow_hub: with `data_dir`, take a task without files from the hub.
        num_fewshot: worked examples in each prompt, where there are any: a task that the harness fixes at zero, or
            whose prompts could then show the item itself, keeps its own number. None: each task's own.

    Returns the tasks that can be run, by name, and why the others can't, by theirs.

    Raises UserError: a name that is no task of the harness, or a local file that holds rows of another shape.
    """
    found: dict[str, Runnable] = {}
    missing: dict[str, str] = {}
    no_network = False
    for name in dict.fromkeys(names):
        lack = None if data_dir is None else _lack(name, data_dir, num_fewshot, say)
        if lack and not allow_hub:
            missing[name] = lack
            continue
        try:
            with generators_kept(), quiet(), squad.lent(), offline(no_network):
                if data_dir is None or lack:
                    task = _load(_manager(name, say), name)
                    source = "hub: " + ", ".join(dict.fromkeys(str(leaf.DATASET_PATH) for leaf in _leaves(task)))
                else:
                    task, source = _from_files(LOCAL[name], data_dir)
        except UserError:
            raise
        except Exception as error:  # whatever the hub, the network or a task's own packages raise
            no_network = no_network or isinstance(error, ConnectionError)
            missing[name] = f"could not be loaded: {one_line(error)[:300]}"
            continue
        found[name] = Runnable(name, task, source, _override(task, num_fewshot))
    return found, missing


def write_definitions(folder: Path, names: Iterable[str], data_dir: Path) -> None:
    """Writes the local definitions of these tasks as YAML files, for the harness's own `--include_path`."""
    for name in names:
        write_text(folder / f"{name}.yaml", definition(LOCAL[name], data_dir))


def _lack(name: str, data_dir: Path, asked: int | None, say: Callable[[str], None]) -> str:
    """Why the local files do not do: the file that isn't there; an empty text if they do."""
    if name not in LOCAL:
        _manager(name, say)  # is there such a task at all?
        return "no local layout is known for it"
    task = LOCAL[name]
    if not (items := data_dir / task.files[task.items]).is_file():
        return f"{items} is not there"
    own = own_settings(task).get("num_fewshot")
    wanted = own or 0 if asked is None or own == 0 else asked
    examples = data_dir / next(iter(task.files.values()))
    if wanted and examples != items and not examples.is_file():
        return f"{examples} is not there, and the prompts take {wanted} worked examples from it"
    return ""


def _from_files(task: Local, data_dir: Path) -> tuple[Any, str]:
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory(prefix="lfu-task-") as folder:
        write_definitions(Path(folder), [task.name], data_dir)
        manager = TaskManager(include_path=folder, include_defaults=False)
        return _load(manager, task.name), task.files[task.items]


def _load(manager: Any, name: str) -> Any:
    """A `Task`, a `Group`, or the tasks of a tag."""
    loaded = manager.load([name])
    if name in loaded["groups"]:
        return loaded["groups"][name]
    tasks = list(loaded["tasks"].values())
    return tasks[0] if len(tasks) == 1 else tasks


def _manager(name: str, say: Callable[[str], None]) -> Any:
    """A task manager that knows the name; UserError if there is none.

    Reading all of the harness's 14,000 definitions takes up to 20 s. Most tasks lie in a folder that their name starts
    with, so that is looked at first.
    """
    folders = [harness_folder() / "_".join(name.split("_")[:end]) for end in range(name.count("_") + 1, 0, -1)]
    for folder in filter(Path.is_dir, folders):
        if name in (manager := _tasks_in(folder)).task_index:
            return manager
    say(f"looking for {name} in all of the harness's tasks (up to 20 s)")
    manager = _tasks_in()
    if name not in manager.task_index:
        raise UserError(
            f"unknown task {name!r}: neither in these categories nor in lm-evaluation-harness."
            f"{did_you_mean(name, manager.all_tasks)}"
        )
    return manager


@cache
def _tasks_in(folder: Path | None = None) -> Any:
    """The harness's tasks of one folder, or all."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False) if folder else TaskManager()


def _leaves(task: Any) -> list[Any]:
    if isinstance(task, list):
        return task
    return task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]


def _override(task: Any, asked: int | None) -> int | None:
    """The number asked for, or None where the task keeps its own."""
    leaves = _leaves(task)
    fixed = any(leaf.get_config("num_fewshot") == 0 for leaf in leaves)
    return None if fixed or any(_would_show_the_item_itself(leaf) for leaf in leaves) else asked


def _would_show_the_item_itself(task: Any) -> bool:
    """Whether the harness would draw examples from the scored rows, without leaving out the one at hand."""
    config, examples = task.config, task.fewshot_cfg
    if examples.split is None and examples.samples is not None:
        return False
    scored = config.test_split or config.validation_split
    drawn = examples.split or config.training_split or config.validation_split or config.test_split
    return drawn == scored and examples.split != config.test_split
