"""Files and folders that are whole or not there: written beside their place, then renamed."""

import errno
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lfu.support.errors import UserError, did_you_mean, one_line

# Begins the name of what is unfinished or being deleted; a killed process may leave one. What it is comes next:
# file-, set- (several files), new-NAME- (a folder), checkpoint-N, old-NAME- (holds what is being replaced), gone-NAME.
WRITING = ".writing-"
YAML_VALUES = 100_000  # values in a YAML file, those that aliases repeat counted each time


# All below raise OSError where a folder can't be made or written, or a file can't be renamed.


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path`, making its folder; a kill in between leaves the old file or none."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """As `write_text`, for bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{WRITING}file-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)  # mkstemp's own is for this user alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`, which takes the place of `target` if the block ends well.

    What a killed process left of an earlier attempt at `target` is cleared: only one may write to it at a time.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    restore(target.parent, glob.escape(target.name))
    left = re.compile(rf"{re.escape(WRITING)}(new|old)-{re.escape(target.name)}-\w{{8}}")  # mkdtemp adds eight
    for path in target.parent.iterdir():
        if left.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{WRITING}new-{target.name}-", dir=target.parent))
    try:
        os.chmod(work, 0o755)  # mkdtemp's own is for this user alone
        yield work
        swap_in(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def swap_in(work: Path, target: Path) -> None:
    """Renames the folder `work` to `target`; an older `target` is moved out of the way first, then deleted.

    A kill between the two renames hides the older one: `restore` gives it its name back.
    """
    if not target.exists():
        os.replace(work, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f"{WRITING}old-{target.name}-", dir=target.parent))
    try:
        os.replace(target, old / target.name)
        try:
            os.replace(work, target)
        except BaseException:
            os.replace(old / target.name, target)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def moved_in(folder: Path, last: re.Pattern[str]) -> Iterator[Path]:
    """Yields an empty folder; if the block ends well its files replace those of the same names in `folder`.

    Without those of a name in `last` the others can't be used: the old ones go first and the new ones come last, so
    that a kill in between never leaves old and new files that are taken for one set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{WRITING}set-", dir=folder))
    try:
        yield work
        made = sorted(work.iterdir(), key=lambda path: bool(last.fullmatch(path.name)))
        for path in made:
            if last.fullmatch(path.name):
                (folder / path.name).unlink(missing_ok=True)
        for path in made:
            (swap_in if path.is_dir() else os.replace)(path, folder / path.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Deletes a folder under another name, so that a kill in between leaves no half of it under its own."""
    gone = path.with_name(f"{WRITING}gone-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def restore(folder: Path, name: str = "*") -> None:
    """Renames folders that a killed process was replacing in `folder` back to their `name` (a glob pattern)."""
    for path in folder.glob(f"{WRITING}old-*/{name}"):
        if not (folder / path.name).exists():
            with suppress(OSError):  # another process was faster
                os.replace(path, folder / path.name)


def remove_unfinished(folder: Path) -> None:
    """Deletes what killed processes were writing in `folder`, where nobody writes now, and restores what they hid."""
    restore(folder)
    for path in folder.glob(f"{WRITING}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


_SAVING_FAILED = re.compile(r"os error|no space left|file too large|inline_container|streamwriter|unexpected pos", re.I)


@contextmanager
def os_errors_only(folder: Path) -> Iterator[None]:
    """Turns what safetensors and torch raise when they can't write into the `OSError` behind it, with `folder`."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if not _SAVING_FAILED.search(str(error)):
            raise
        number = re.search(r"os error (\d+)", str(error))
        full = shutil.disk_usage(folder).free < 2**20 if folder.is_dir() else False
        code = int(number[1]) if number else errno.ENOSPC if full else errno.EIO
        raise OSError(code, os.strerror(code), str(folder)) from error


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file, by the safe loader. Raises UserError (`what` names it): unreadable, or no YAML."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path}: {not_utf8(path)}") from error
    # beside its own errors: a date such as 2001-99-99, nesting without end, a number of too many digits
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError) as error:
        raise UserError(f"{what} {path}: not valid YAML ({one_line(error)})") from error
    except OSError as error:
        raise UserError(f"{what} {path}: can't be read ({error.strerror})") from error
    if not _fits(found, YAML_VALUES):
        raise UserError(f"{what} {path}: its aliases (*name) stand for more than {YAML_VALUES:,} values")
    return found


def named_yaml(name: str, shipped: Mapping[str, Path], what: str, listed: str = "") -> Path:
    """The file of a shipped name, or of a path. Raises UserError: neither; it names those `listed` and the closest."""
    path = shipped.get(name) or Path(name).expanduser()
    if path.is_file():
        return path
    known = listed or ", ".join(shipped)
    raise UserError(
        f"{what} {name}: no such file, and none of the shipped ones ({known}).{did_you_mean(name, shipped)}"
    )


def _fits(value: Any, limit: int) -> bool:
    """Whether there are at most `limit` values in `value`, one that is there several times counted each time."""
    seen, waiting = 0, [value]
    while waiting and seen <= limit:
        one = waiting.pop()
        seen += 1
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list | set | tuple) else []
    return not waiting


def not_utf8(path: Path) -> str:
    """What is wrong with a text file in another encoding: the first line that is not UTF-8, and a likely encoding."""
    data = path.read_bytes()
    try:
        data.decode("utf-8")
        where = ""
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, error.start - data.rfind(b"\n", 0, error.start)
        where = f"line {line}, byte {byte}; "
    marks = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
    guess = next((name for mark, name in marks.items() if data.startswith(mark)), "Latin-1 or Windows-1252, perhaps")
    return f"not UTF-8 text ({where}{guess}): save it as UTF-8"


def dump_json(value: Any) -> str:
    """`value` as indented JSON, text in its own script."""
    return json.dumps(value, indent=1, ensure_ascii=False)
