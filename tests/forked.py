"""Programs in processes of their own, forked from a server that has imported everything once (importing takes 7 s)."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from threading import Thread
from typing import Any

import quicker

IMPORTED = [
    "torch.distributed.tensor", "trl", "peft", "datasets", "matplotlib.pyplot", "lfu.trainer", "lfu.cli.train",
    "lfu.cli.compare", "lfu.forgetting", "tiny",
]  # fmt: skip


def process(function: Callable[..., Any], *args: Any) -> Any:
    """A `multiprocessing.Process`, not yet started; it ends with the test's own process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context.Process(target=_started, args=(function, args), daemon=True)


def _started(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    gc.freeze()
    quicker.libraries()
    function(*args)


class Popen:
    """`subprocess.Popen` of `python -m lfu.cli WORDS` or `python PROGRAM`, without Python's start and the imports.

    Args:
        stdout: a file, or None for nowhere; `stderr` likewise.
        given: what is in the pipe at its standard input.
    """

    def __init__(
        self,
        command: list[str],
        *,
        env: Mapping[str, str] | None = None,
        stdout: Any = None,
        stderr: Path | None = None,
        given: str = "",
    ):
        files = [file if isinstance(file, Path) else Path(os.devnull) for file in (stdout, stderr)]
        environment = dict(os.environ if env is None else env)
        self.process = process(_program, command[1:], environment, os.getcwd(), files, given)
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit code; None if the process is not over after so many seconds."""
        self.process.join(timeout)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()


@contextmanager
def python(folder: Path) -> Iterator[Path]:
    """An executable that stands for Python's within the block: what others start by it is a `Popen` of this process."""
    address, path = str(folder / "socket"), folder / "python"
    path.write_text(
        f"#!{sys.executable} -IS\nimport os, sys\nfrom multiprocessing.connection import Client\n"
        f"server = Client({address!r})\nserver.send((sys.argv, dict(os.environ)))\nsys.exit(server.recv())\n"
    )
    path.chmod(0o755)

    def answer(client: Connection) -> None:
        command, environment = client.recv()
        client.send(Popen(command, env=environment).wait())

    def listen(listener: Listener) -> None:
        with suppress(OSError):  # it is closed
            while True:
                Thread(target=answer, args=(listener.accept(),), daemon=True).start()

    with Listener(address) as listener:
        Thread(target=listen, args=(listener,), daemon=True).start()
        yield path


def run(command: list[str], folder: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of the same, with what it printed; `folder` is for the two files that hold that meanwhile."""
    out, err = folder / "stdout", folder / "stderr"
    code = Popen(command, stdout=out, stderr=err, given=given).wait()
    return subprocess.CompletedProcess(command, code or 0, out.read_text(), err.read_text())


def _program(words: list[str], environment: dict[str, str], folder: str, files: list[Path], given: str) -> None:
    os.environ.clear()
    os.environ |= environment
    os.chdir(folder)
    read, write = os.pipe()
    os.write(write, given.encode())
    os.close(write)
    os.dup2(read, 0)
    for number, file in zip((1, 2), files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    if words[:2] == ["-m", "lfu.cli"]:
        from lfu.cli import main

        sys.exit(main(words[2:]))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
