"""What decides the result of a run, as one short text: two runs with the same key give the same result."""

import hashlib
import inspect
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

import lfu
from lfu.evaluation.record import digest, versions
from lfu.methods import methods_of
from lfu.methods.knobs import knobs_of
from lfu.model.embedded import EMBEDDED, embedded_folder
from lfu.model.loading import adapter_base, is_adapter
from lfu.study.settings import classes_of
from lfu.support.files import dump_json, write_text

NOTE = "environment.json"  # in the study's folder
FORMAT = 1  # raise it when what a run keeps changes: older runs are then done anew
WHOLE = 2**26  # bytes; of larger files 64 pieces of a mebibyte are read
# Fields of the config that change what is written or shown, not what is computed.
NO_MATTER = {
    "output_dir", "run_name", "logging_dir", "report_to", "project", "disable_tqdm", "log_level", "log_level_replica",
    "log_on_each_node", "logging_strategy", "logging_steps", "logging_first_step", "save_strategy", "save_steps",
    "save_total_limit", "save_on_each_node", "resume_from_checkpoint", "dataloader_num_workers",
    "dataloader_pin_memory", "dataset_num_proc", "advice", "log_layers",
}  # fmt: skip
# What of the model's arguments decides how the untouched model is loaded.
LOADING = {
    "dtype", "attn_implementation", "load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
}  # fmt: skip
# What the machine decides where it isn't given: the kind of device, which is part of every key, then stands for it.
RESOLVED = {"bf16", "dtype"}
NAMES = {"model_name_or_path", "model_revision"}  # the files themselves are hashed: they may lie elsewhere
# Parts of the package that change no result; of the study itself all but what trains and what measures.
APART = {"report", "cli", "recipes"}
OF_STUDY = {"train.py", "measure.py", "rows.py"}


def run_key(config: Any, model_arguments: Any, more: Mapping[str, Any], given: Collection[str] = ()) -> str:
    """The key of a run.

    Args:
        more: hashes and settings of everything that is not in its two configs, the kind of device among them.
        given: fields of `RESOLVED` that were set.
    """
    unset = RESOLVED.difference(given)
    settings = {name: value for name, value in config.to_dict().items() if name not in NO_MATTER | unset}
    arguments = {name: value for name, value in asdict(model_arguments).items() if name not in NAMES | unset}
    return digest([FORMAT, settings, arguments, dict(more), methods_code(config.method), _files_in_knobs(config)])


def start_key(model_arguments: Any, more: Mapping[str, Any], given: Collection[str] = ()) -> str:
    """The key of the untouched model, which no training setting touches; arguments as for `run_key`."""
    wanted = LOADING if "dtype" in given else LOADING - {"dtype"} | {"use_peft"}  # an unset dtype hangs on that
    loading = {name: value for name, value in asdict(model_arguments).items() if name in wanted}
    return digest([FORMAT, loading, dict(more)])


def here() -> dict[str, Any]:
    """What of this machine decides results: its kind of device, and the versions of the packages.

    Who trains leaves a note of it in the study's folder. Who only plans or reports, on a cluster's login node or a
    laptop that the folder was copied to, goes by the note: the runs' keys are those of the machine that trained.
    """
    return {"device": device(), "versions": versions()}


def noted(folder: Path) -> dict[str, Any] | None:
    """That of the machine that trained last in the study's folder; None if none has."""
    try:
        return json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def note(folder: Path, environment: dict[str, Any]) -> None:
    """Leaves it for those that plan and report. Raises OSError: the folder can't be written."""
    if noted(folder) != environment:
        write_text(folder / NOTE, dump_json(environment))


def device() -> str:
    """`cuda` or `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def package_code() -> str:
    """Hash of the code and data of this package, what only writes reports left out."""
    package = Path(lfu.__file__).parent
    parts = {file: file.relative_to(package).parts for file in package.rglob("*")}
    of_study = lambda file: parts[file][0] != "study" or file.name in OF_STUDY
    code = (file for file in parts if file.suffix in (".py", ".jsonl", ".yaml") and parts[file][0] not in APART)
    return of_files(package, filter(of_study, code))


def methods_code(method: str) -> str:
    """Hash of the files of methods that are not in this package."""
    files = {inspect.getsourcefile(each) for each in classes_of(method).values()}
    outside = sorted(Path(file) for file in files if file and "lfu/methods" not in Path(file).as_posix())
    return digest([file.read_text(encoding="utf-8") for file in outside])


def _files_in_knobs(config: Any) -> list[str]:
    """Hashes of the files that the methods' knobs name as something to read: the general data of replay, the texts of
    CorDA. SDFT's cache fills while it runs, and what is in it is what the run would write."""
    methods = methods_of(config.method, config.method_args)
    values = [getattr(m, f.name) for m in methods for f in knobs_of(m) if not f.metadata["output"]]
    paths = [Path(value).expanduser() for value in values if isinstance(value, str) and value]
    return [_of_path(path) for path in paths if path.exists()]


def model_files(name: str, revision: str | None, *, trust_remote_code: bool = False) -> str:
    """Hash of a model's files: of their content in a folder, of the commit on the hub."""
    folder = embedded_folder(name) if name in EMBEDDED else Path(name).expanduser()
    if not folder.is_dir():
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        return digest([name, getattr(config, "_commit_hash", None)])
    base = adapter_base(folder) if is_adapter(folder) else None
    return digest([_of_path(folder), model_files(base, None, trust_remote_code=trust_remote_code) if base else ""])


def _of_path(path: Path) -> str:
    """Hash of a file, or of the files of a folder."""
    if not path.is_dir():
        return of_files(path.parent, [path])
    return of_files(path, (file for file in path.iterdir() if file.is_file()))


def of_files(folder: Path, files: Iterable[Path]) -> str:
    """Hash of names (below `folder`) and contents of files, hidden ones left out; 16 hex digits."""
    found = hashlib.sha256()
    for file in sorted(file for file in files if not file.name.startswith(".")):
        found.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n".encode())
        for piece in _pieces(file):
            found.update(piece)
    return found.hexdigest()[:16]


def _pieces(file: Path) -> Iterable[bytes]:
    """The whole of a small file; of a large one pieces spread over all of it."""
    size = file.stat().st_size
    with file.open("rb") as source:
        if size <= WHOLE:
            yield source.read()
            return
        for number in range(64):
            source.seek(number * (size - 2**20) // 63)
            yield source.read(2**20)
