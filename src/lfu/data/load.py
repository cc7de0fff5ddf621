"""Rows from wherever the user keeps them: a file, a folder, the hub, or the built-in word problems."""

import difflib
import re
from collections.abc import Collection, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import Dataset

from lfu.data.columns import as_dataset
from lfu.data.files import SUFFIXES, file_rows
from lfu.support.errors import UserError, one_line, value_errors_are_the_users

BUILT_IN = "word_problems"
BUILT_IN_ROWS = {"train": 400, "test": 100}
# rows, which are not read
_UNREAD = {".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tsv", ".ndjson", ".arrow", ".xlsx"}
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json")  # what `datasets` writes beside rows
# How the splits are called in file names; the first name is the one the user gives.
SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def load_rows(
    name_or_path: str, *, split: str = "train", config: str | None = None, limit: int | None = None
) -> Dataset:
    """Loads a data set.

    Args:
        name_or_path: a json, jsonl, csv or parquet file; a folder of such files; a name on the hub; or
            `word_problems`, the built-in set (`word_problems:200` for 200 rows of it).
        split: the split of a hub data set, of the built-in set, or of a folder whose files are named after splits.
            A single file is one split whatever this says.
        config: the configuration of a hub data set that has several (`main` for openai/gsm8k).
        limit: at most so many rows, from the start.

    Raises:
        UserError: if there is no such data set, it can't be read (with file and line), or it has no rows.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the number of rows must be at least 1, got {limit}")
    path = Path(name_or_path).expanduser()
    if name_or_path.partition(":")[0] == BUILT_IN:
        return _built_in(name_or_path, split, limit)
    if path.exists():
        kept = list(islice(_folder_rows(path, split) if path.is_dir() else file_rows(path), limit))
        if not kept:
            raise UserError(f"data {path}: empty, there is no row in it")
        return as_dataset(kept)
    if _is_path(name_or_path):
        raise UserError(f"data {name_or_path}: no such file or folder.{_close_files(path)}")
    return _from_hub(name_or_path, split, config, limit)


def check_part(name: str, prefix: str, given: Collection[str]) -> None:
    """Raises UserError if the flags `split` or `config`, behind a prefix, were `given` for a set that has only one."""
    path = Path(name).expanduser()
    if f"{prefix}split" in given and path.is_file():
        raise UserError(f"--{prefix}split says which split is read, and {name} is a single file: drop it")
    if f"{prefix}config" in given and (path.exists() or name.partition(":")[0] == BUILT_IN):
        raise UserError(f"--{prefix}config is for data sets on the hub, and {name} is none: drop it")


def _built_in(name: str, split: str, limit: int | None) -> Dataset:
    from lfu.data.word_problems import word_problems

    count = name.partition(":")[2]
    if count and not count.isdecimal():
        raise UserError(f"data {name}: write the number of rows after the colon, as in {BUILT_IN}:200")
    n = int(count) if count else BUILT_IN_ROWS.get(split, 100)
    with value_errors_are_the_users(f"data {name}"):
        return Dataset.from_list(word_problems(split, n if limit is None else min(n, limit)))  # type: ignore[arg-type]


def _is_path(name: str) -> bool:
    """Whether a name that exists nowhere here was meant as a path: it looks like one, or can't be a hub name."""
    return name.startswith((".", "/", "~")) or Path(name).suffix.lower() in SUFFIXES or name.count("/") > 1


def _close_files(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" There is no folder {folder} either."
    names = [entry.name for entry in folder.iterdir() if entry.is_dir() or entry.suffix.lower() in SUFFIXES]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f" In {folder} there is {', '.join(close)}: did you mean that?" if close else " Check the path."


def _folder_rows(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    there = sorted(file for file in folder.iterdir() if file.name not in _NO_ROWS)
    files = [file for file in there if file.suffix.lower() in SUFFIXES]
    if other := next((file for file in there if _UNREAD & {*file.suffixes}), None):
        raise UserError(f"data {folder}: {other.name} can't be read: make it one of {', '.join(SUFFIXES)}, or move it")
    if not files:
        raise UserError(f"data {folder}: the folder holds no {', '.join(SUFFIXES)} file")
    split = next((name for name, names in SPLIT_NAMES.items() if split in names), split)
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file), []).append(file)
    # Files named after no split at all are one set together, which counts as the training set.
    wanted = by_split.get(split) or (by_split.get("") if split == "train" else None)
    if not wanted:
        named = ", ".join(sorted(filter(None, by_split))) or "none"
        raise UserError(f"data {folder}: no file for split {split!r}; splits by file name: {named}")
    if {"", "train"} <= {*by_split}:
        raise UserError(
            f"data {folder}: {by_split[''][0].name} is named after no split, and {by_split['train'][0].name} is the "
            "training set: name it, or move it"
        )
    return chain.from_iterable(map(file_rows, wanted))


def _split_of(file: Path) -> str:
    """`train` for train.jsonl, train-00000-of-00002.parquet or gsm8k_train.csv; an empty text where no split shows."""
    words = set(re.split(r"[-_.]", file.stem.lower()))
    return next((split for split, names in SPLIT_NAMES.items() if words & set(names)), "")


def _from_hub(name: str, split: str, config: str | None, limit: int | None) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetBuildError, DatasetsError

    wrong = (OSError, ValueError, KeyError, DatasetsError)
    try:
        rows = load_dataset(name, config, split=split)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise UserError(f"data {name}: {one_line(error)}") from error
        # A loading script would be code from the hub; the hub's own copy of the same set as parquet is data only.
        try:
            rows = load_dataset(name, config, split=split, revision="refs/convert/parquet")
        except (RuntimeError, *wrong) as error:
            raise UserError(
                f"data {name}: comes as a loading script, which is not run, and has no parquet copy "
                f"({one_line(error)}): download the file and give its path"
            ) from error
    except DatasetBuildError as error:  # it is there, and broken; its cause says more than it does
        raise UserError(f"data {name}: can't be read ({one_line(error.__cause__ or error)})") from error
    except wrong as error:
        raise UserError(
            f"data {name}: no file of that name here, and from the hub: {one_line(error)}. "
            "Check the name, --data_config and --data_split; without a network give a local file or word_problems"
        ) from error
    if not len(rows):
        raise UserError(f"data {name}: split {split!r} is empty")
    return rows if limit is None else rows.select(range(min(limit, len(rows))))
