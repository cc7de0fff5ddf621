"""Rows of local files in the hub data sets' columns, which the harness's task definitions read.

Each function takes one row, in the local layout or already in the hub's, and returns the columns that the harness's
definition of the task uses. A row that is neither raises KeyError, TypeError or ValueError.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def columns(*names: str, optional: Sequence[str] = ()) -> Callable[[Row], dict[str, Any]]:
    """A row in the hub's columns already: those that are read are taken, the rest is left."""
    return lambda row: {name: row[name] for name in names} | {name: row.get(name) for name in optional}


def arc(row: Row) -> dict[str, Any]:
    """`question`, `choices` (texts), `answer` (index from 0) -> allenai/ai2_arc."""
    if isinstance(row["choices"], Mapping):
        return columns("question", "choices", "answerKey")(row)
    texts, right = _choices(row["choices"], row["answer"])
    labels = list(string.ascii_uppercase[: len(texts)])
    return {"question": row["question"], "choices": {"text": texts, "label": labels}, "answerKey": labels[right]}


def mathqa(row: Row) -> dict[str, Any]:
    """`question`, `choices` (five texts), `answer` (index from 0) -> regisss/math_qa.

    There the options are one string, which the harness cuts at commas: an option that holds `, ` is cut short, here
    as there.
    """
    if "Problem" in row:
        return columns("Problem", "options", "correct")(row)
    texts, right = _choices(row["choices"], row["answer"])
    if len(texts) != 5:
        raise ValueError(f"MathQA has five choices, this row has {len(texts)}")
    options = " , ".join(f"{letter} ) {text}" for letter, text in zip("abcde", texts))
    return {"Problem": row["question"], "options": options, "correct": "abcde"[right]}


def mmlu(row: Row) -> dict[str, Any]:
    """`subject`, `question`, `choices` (four texts), `answer` (index from 0): cais/mmlu has the same columns."""
    texts, right = _choices(row["choices"], row["answer"])
    if len(texts) != 4:
        raise ValueError(f"MMLU has four choices, this row has {len(texts)}")
    return {"subject": str(row["subject"]), "question": row["question"], "choices": texts, "answer": right}


def lambada(row: Row) -> dict[str, Any]:
    """`context`, `answer` (its next word) -> EleutherAI/lambada_openai, which has the whole `text`."""
    if "text" in row:
        return columns("text")(row)
    if len(str(row["answer"]).split(" ")) != 1:  # the harness takes what follows the last space as the answer
        raise ValueError(f"the answer must be one word, got {row['answer']!r}")
    return {"text": f"{row['context']} {row['answer']}"}


def truthfulqa_mc(row: Row) -> dict[str, Any]:
    """`question`, `mc1_choices`, `mc1_answer` (index), `mc2_choices`, `mc2_labels` -> truthfulqa/truthful_qa.

    There the right choice of mc1 comes first, and the harness's target is always the first.
    """
    if "mc1_targets" in row:
        return columns("question", "mc1_targets", "mc2_targets")(row)
    texts, right = _choices(row["mc1_choices"], row["mc1_answer"])
    first = [texts[right], *texts[:right], *texts[right + 1 :]]
    labels = [int(label) for label in row["mc2_labels"]]
    if len(labels) != len(row["mc2_choices"]) or not {0, 1} >= set(labels):
        raise ValueError("mc2_labels must hold a 0 or a 1 for each of mc2_choices")
    return {
        "question": row["question"],
        "mc1_targets": {"choices": first, "labels": [1] + [0] * (len(first) - 1)},
        "mc2_targets": {"choices": [str(text) for text in row["mc2_choices"]], "labels": labels},
    }


def _choices(choices: Any, answer: Any) -> tuple[list[str], int]:
    """(the texts, the index of the right one)."""
    if not isinstance(choices, list | tuple):
        raise TypeError(f"choices must be a list, got {type(choices).__name__}")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"answer must be an index into the {len(choices)} choices, got {answer!r}")
    return [str(text) for text in choices], answer
