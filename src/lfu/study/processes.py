"""Several processes on one machine: each takes the runs that no other has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from lfu.errors import UserError
from lfu.study.study import Study

VISIBLE = "CUDA_VISIBLE_DEVICES"


def work_in_processes(study: Study, jobs: int, command: Sequence[str]) -> None:
    """Runs a command in `jobs` processes until nothing is left to do.

    Args:
        command: after the name of the Python interpreter; it is given `--jobs 1 --worker SESSION` beside.

    Raises:
        UserError: a process stopped with an error of the user's.
        KeyboardInterrupt: so did one of them, or this one.
    """

    def start(count: int) -> list[int]:
        workers = [
            subprocess.Popen(
                [sys.executable, *command, "--jobs", "1", "--worker", study.session],
                env=os.environ | _share(number, jobs), stdout=subprocess.DEVNULL,
            )
            for number in range(min(jobs, count))
        ]  # fmt: skip
        return _wait(workers)

    in_rounds(study, start, "a process stopped with the error above")


def in_rounds(study: Study, start: Callable[[int], list[int]], mistake: str) -> None:
    """Starts workers until nothing is left to do, or twice nothing comes of it.

    Args:
        start: runs workers for so many tasks to their end; gives their exit codes.
        mistake: what is said of one that stopped with an error of the user's.

    Raises:
        UserError, KeyboardInterrupt: as a worker did.
    """
    idle = 0  # rounds in which workers died and nothing else came of it
    while (before := len(study.mine())) and idle < 2:
        codes = start(before)
        study.follow()
        if 130 in codes:
            raise KeyboardInterrupt
        if 2 in codes:
            raise UserError(mistake)
        if not any(codes):
            return
        # One died. Whoever takes its run next knows that and calls it failed; the others go on.
        idle = idle + 1 if len(study.mine()) == before else 0


def _wait(workers: list[subprocess.Popen]) -> list[int]:
    try:
        return [worker.wait() for worker in workers]
    except KeyboardInterrupt:
        for worker in workers:  # they have been told, too: each keeps what it has
            worker.wait()
        raise


def _share(number: int, jobs: int) -> dict[str, str]:
    """The environment of a process: its share of the threads, and one GPU."""
    import torch

    threads = max(1, torch.get_num_threads() // jobs)
    found = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if gpus := visible_gpus():
        found[VISIBLE] = gpus[number % len(gpus)]
    return found


def keep_one_gpu() -> int:
    """Of several GPUs this process sees one from now on: transformers would spread every batch over all of them.

    Returns:
        how many there were. To be called before anything uses CUDA.
    """
    gpus = visible_gpus()
    if len(gpus) > 1:
        os.environ[VISIBLE] = gpus[0]
    return len(gpus)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    count = torch.cuda.device_count()
    listed = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return listed[:count] if listed else [str(number) for number in range(count)]
