"""The harness's tasks over files of one's own: its prompts, scoring, metrics and filters, other rows.

A definition here is a YAML text for the harness that includes the harness's own file and replaces the data set alone.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from lfu.evaluation.tasks import rows
from lfu.support.errors import UserError, one_line


@dataclass(frozen=True)
class Local:
    """One task, by the harness's name."""

    name: str
    harness: str  # the definition's file below the harness's folder of tasks
    files: Mapping[str, str]  # split, as the definition calls it -> file below the data folder; JSON lines
    row: Callable[[Mapping[str, Any]], dict[str, Any]]  # turns a row of those files into the hub's columns
    more: str = ""  # further lines of the YAML text

    @property
    def items(self) -> str:
        """The split that is scored, the last. Worked examples are drawn from the first, where there are two."""
        return list(self.files)[-1]


def _splits(folder: str, *names: str) -> dict[str, str]:
    return {name: f"{folder}/{name}.jsonl" for name in names}


_ALL = ("train", "validation", "test")
_MMLU = """\
test_split: test
fewshot_split: dev
class: !function lfu.evaluation.tasks.mmlu.MMLU
description: "The following are multiple choice questions (with answers) about {{subject.replace('_', ' ')}}.\\n\\n"
"""
_TRUTHFULQA = {"validation": "truthfulqa/mc.jsonl"}
_PIQA = rows.columns("goal", "sol1", "sol2", "label")
_HELLASWAG = rows.columns("ctx_a", "ctx_b", "activity_label", "endings", "label")
_COQA = rows.columns("story", "questions", "answers", optional=["additional_answers"])
_TOXIGEN = rows.columns("text", "toxicity_ai", "toxicity_human")
_GENERATION = rows.columns("question", "best_answer", "correct_answers", "incorrect_answers")
_TASKS = [
    Local("gsm8k", "gsm8k/gsm8k.yaml", _splits("gsm8k", "train", "test"), rows.columns("question", "answer")),
    Local("mathqa", "mathqa/mathqa.yaml", _splits("mathqa", *_ALL), rows.mathqa),
    Local("asdiv", "asdiv/default.yaml", _splits("asdiv", "validation"), rows.columns("body", "question", "answer")),
    Local("mmlu", "mmlu/default/_default_template_yaml", _splits("mmlu", "dev", "test"), rows.mmlu, _MMLU),
    Local("piqa", "piqa/piqa.yaml", _splits("piqa", "train", "validation"), _PIQA),
    Local("hellaswag", "hellaswag/hellaswag.yaml", _splits("hellaswag", "train", "validation"), _HELLASWAG),
    Local("lambada_openai", "lambada/lambada_openai.yaml", _splits("lambada", "test"), rows.lambada),
    Local("lambada_standard", "lambada/lambada_standard.yaml", _splits("lambada_standard", "validation", "test"),
          rows.lambada),
    Local("arc_easy", "arc/arc_easy.yaml", _splits("arc_easy", *_ALL), rows.arc),
    Local("arc_challenge", "arc/arc_challenge.yaml", _splits("arc_challenge", *_ALL), rows.arc),
    Local("coqa", "coqa/default.yaml", _splits("coqa", "train", "validation"), _COQA),
    Local("toxigen", "toxigen/toxigen.yaml", _splits("toxigen", "train", "test"), _TOXIGEN),
    Local("truthfulqa_mc1", "truthfulqa/truthfulqa_mc1.yaml", _TRUTHFULQA, rows.truthfulqa_mc),
    Local("truthfulqa_mc2", "truthfulqa/truthfulqa_mc2.yaml", _TRUTHFULQA, rows.truthfulqa_mc),
    Local("truthfulqa_gen", "truthfulqa/truthfulqa_gen.yaml", {"validation": "truthfulqa/generation.jsonl"},
          _GENERATION),
]  # fmt: skip
LOCAL: dict[str, Local] = {task.name: task for task in _TASKS}


def harness_folder() -> Path:
    """The folder with the harness's own task definitions."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def own_settings(task: Local) -> dict[str, Any]:
    """What the harness's own file says; functions as text."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(harness_folder() / task.harness, resolve_func=False)


def definition(task: Local, data_dir: Path) -> str:
    """The task over the files below `data_dir`, as YAML text for the harness. Splits without a file are taken out."""
    there = {split: str(data_dir.resolve() / file) for split, file in task.files.items() if (data_dir / file).is_file()}
    own = own_settings(task)
    splits = [f"{kind}_split" for kind in ("training", "validation", "test", "fewshot")]
    gone = [split for split in splits if own.get(split) and own[split] not in there]
    lines = [
        f"include: {json.dumps(str(harness_folder() / task.harness))}",
        *task.more.splitlines(),
        *(f"{split}: null" for split in gone),
        f"task: {task.name}",
        "custom_dataset: !function lfu.evaluation.tasks.local.read",
        f"dataset_kwargs: {json.dumps({'local_task': task.name, 'local_files': there})}",
    ]
    return "\n".join([*lines, ""])


def read(*, local_task: str, local_files: Mapping[str, str], **metadata: Any) -> dict[str, Any]:
    """What a definition's `custom_dataset` calls: split -> `datasets.Dataset` with the hub's columns.

    The harness passes `metadata` along, the definition's and the command line's; they are not used.

    Raises UserError: a file that can't be read, holds no rows, or a row of another shape, with its line.
    """
    task = LOCAL[local_task]
    return {split: Dataset.from_list(_rows(Path(file), task)) for split, file in local_files.items()}


def _rows(path: Path, task: Local) -> list[dict[str, Any]]:
    found = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 inside a text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({one_line(error)})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(task.row(json.loads(line)))
        except KeyError as error:
            raise UserError(f"{path} line {number}: no column {error.args[0]!r}, which {task.name} needs") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} line {number}: {one_line(error)}") from error
    if not found:
        raise UserError(f"{path}: holds no rows")
    return found
