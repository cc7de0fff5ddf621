"""`lfu doctor`: what is installed, what each command still needs, and what this machine has."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from lfu.cli.parser import LineParser
from lfu.support.extras import COMMANDS, EXTRAS, install, missing

CORE = ("torch", "transformers")
GIB = 2**30


def run(argv: list[str]) -> int:
    """Prints versions, machine and commands. Nothing is written, and the network is not used.

    Returns:
        0 if everything that is installed is of a version that this one works with, else 1.
    """
    parser = LineParser(prog="lfu doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    faults = wrong_versions()
    for title, lines in (
        ("Packages", list(_packages(faults))),
        ("This machine", list(_machine())),
        ("Commands", list(_commands())),
    ):
        print(title, *(f"  {line}" for line in lines), "", sep="\n")
    for line in faults.values():
        print(line)
    print("Something above is too old or too new." if faults else "What is installed fits together.")
    return 1 if faults else 0


def wrong_versions(distribution: str = "lfu-tuning") -> dict[str, str]:
    """Package -> one line, for each installed package whose version this release does not take."""
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


def _packages(faults: dict[str, str]) -> Iterator[str]:
    from lfu import __version__

    yield _row("lfu-tuning", __version__)
    yield _row("Python", platform.python_version())
    for name in dict.fromkeys([*CORE, *(package for modules in EXTRAS.values() for package in modules.values())]):
        extra = next((extra for extra, modules in EXTRAS.items() if name in modules.values()), None)
        version = _version(name) or f"not installed ({install([extra]) if extra else f'pip install {name}'})"
        yield _row(name, version + ("  <- see below" if name in faults else ""))


def _machine() -> Iterator[str]:
    yield _row("system", platform.platform(terse=True))
    yield _row("processor", f"{len(os.sched_getaffinity(0))} cores to use")
    pages = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_AVPHYS_PAGES")
    total, free = (count * os.sysconf("SC_PAGE_SIZE") / GIB for count in pages)
    yield _row("memory", f"{total:.1f} GiB, {free:.1f} GiB of it free")
    yield _row("disk", f"{shutil.disk_usage(Path.cwd()).free / GIB:.0f} GiB free in this folder")
    yield from _gpus()


def _gpus() -> Iterator[str]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield _row("GPU", f"unknown, since torch can't be imported ({type(error).__name__}: {error})")
        return
    if not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "torch sees none (driver?)"
        yield _row("GPU", f"none: {why}; training runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        bf16 = "bf16" if torch.cuda.get_device_capability(index) >= (8, 0) else "no bf16: use --fp16 true"
        name = torch.cuda.get_device_name(index)
        yield _row(f"GPU {index}", f"{name}, {total / GIB:.0f} GiB, {free / GIB:.0f} GiB of it free, {bf16}")


def _commands() -> Iterator[str]:
    from lfu.cli import VERBS

    ready = [verb for verb in VERBS if not missing(*COMMANDS.get(verb, ()))]
    yield _row("ready", ", ".join(ready))
    for verb in (verb for verb in VERBS if verb not in ready):
        extras = [extra for extra in COMMANDS[verb] if missing(extra)]
        yield _row(verb, f"needs {', '.join(missing(*extras))}: {install(extras)}")


def _row(name: str, text: str) -> str:
    return f"{name:<14}{text}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
