"""Show what is installed, what each command still needs, and what this machine has."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from lfu.support.extras import EXTRAS, install, missing
from lfu.support.flags import LineParser
from lfu.support.words import filled

CORE = ("torch", "transformers")
GIB = 2**30


def run(argv: list[str]) -> int:
    """Prints versions, machine and commands. Writes nothing, uses no network. Returns 1 if a version does not fit."""
    LineParser(prog="lfu doctor", description=__doc__).parse_args(argv)
    faults = wrong_versions()
    for title, rows in (("Packages", _packages(faults)), ("This machine", _machine()), ("Commands", _commands())):
        print(title, *(filled(text, f"  {name:<14}", " " * 16) for name, text in rows), "", sep="\n")
    for line in faults.values():
        print(line)
    print("Something above is too old or too new." if faults else "What is installed fits together.")
    return 1 if faults else 0


def wrong_versions(distribution: str = "lfu-tuning") -> dict[str, str]:
    """Package -> one line, for each installed package whose version this release does not support."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return {}
    wrong = {}
    for wanted in map(Requirement, lines):
        found = _version(wanted.name)
        if found and wanted.name != distribution and not wanted.specifier.contains(found, prereleases=True):
            wrong[wanted.name] = f"{wanted.name} {found} is installed; needed: {wanted.name}{wanted.specifier}"
    return wrong


def _packages(faults: dict[str, str]) -> Iterator[tuple[str, str]]:
    from lfu import __version__

    yield "lfu-tuning", __version__
    yield "Python", platform.python_version()
    extras = {package: extra for extra in reversed(EXTRAS) for package in EXTRAS[extra].values()}
    for name in dict.fromkeys([*CORE, *(package for modules in EXTRAS.values() for package in modules.values())]):
        how = install([extras[name]]) if name in extras else f"pip install {name}"
        yield name, (_version(name) or f"not installed ({how})") + ("  <- see below" if name in faults else "")


def _machine() -> Iterator[tuple[str, str]]:
    yield "system", platform.platform(terse=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has none
    yield "processor", f"{cores} cores to use"
    try:
        import psutil
    except ImportError:
        yield "memory", "unknown without psutil, which comes with accelerate"
    else:
        memory = psutil.virtual_memory()
        yield "memory", f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB of it free"
    yield "disk", f"{shutil.disk_usage(Path.cwd()).free / GIB:.0f} GiB free in this folder"
    try:
        import torch
    except (ImportError, OSError) as error:
        yield "GPU", f"unknown, since torch can't be imported ({type(error).__name__}: {error})"
        return
    if torch.backends.mps.is_available():
        yield "GPU", "Apple's, on which lfu has not been tried; --use_cpu true trains on the CPU"
    elif not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "torch sees none (driver?)"
        yield "GPU", f"none: {why}; training runs on the CPU"
    for index in range(torch.cuda.device_count()):
        free, total = (count / GIB for count in torch.cuda.mem_get_info(index))
        bf16 = "bf16" if torch.cuda.get_device_capability(index) >= (8, 0) else "no bf16: use --fp16 true"
        yield f"GPU {index}", f"{torch.cuda.get_device_name(index)}, {total:.0f} GiB, {free:.0f} GiB of it free, {bf16}"


def _commands() -> Iterator[tuple[str, str]]:
    from lfu.cli import VERBS

    lacking = {verb: [extra for extra in extras if missing(extra)] for verb, (_, extras) in VERBS.items()}
    yield "ready", ", ".join(verb for verb, extras in lacking.items() if not extras)
    for verb, extras in lacking.items():
        if extras:
            yield verb, f"needs {', '.join(missing(*extras))}: {install(extras)}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
