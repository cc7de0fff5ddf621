"""Several processes on one machine: each takes the runs that no other has."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import psutil
import torch

from lfu.study.study import Study
from lfu.support.errors import UserError
from lfu.support.words import listed

VISIBLE = "CUDA_VISIBLE_DEVICES"
HEADROOM = 1.5  # what a training of another method may take, of the first one's memory
POLL = 0.5  # seconds between two looks at whether that is known


def worker(study: Study, command: Sequence[str]) -> list[str]:
    """The command of one more process: `command` comes after the name of the Python interpreter."""
    return [sys.executable, *command, "--jobs", "1", "--worker", study.session]


def work_in_processes(study: Study, jobs: int, command: Sequence[str]) -> None:
    """Runs a command in `jobs` processes, or as many as memory and GPUs allow, until nothing is left to do.

    The first process begins alone; what its first training took at most tells how many there is room for.
    Raises UserError or KeyboardInterrupt where a process did.
    """
    gpus = visible_gpus()
    if 0 < len(gpus) < jobs:
        jobs = len(gpus)
        study.say(f"{jobs} processes at once: one per GPU")

    def begin(number: int) -> subprocess.Popen:
        environment = os.environ | _share(number, jobs)
        return subprocess.Popen(worker(study, command), env=environment, stdout=subprocess.DEVNULL)

    def start() -> list[int]:
        room, workers = free_memory(), [begin(0)]
        try:
            useful = min(jobs, study.useful(jobs))
            if useful > 1 and not gpus:
                useful = _fitting(study, useful, room, workers[0])
            workers += [begin(number) for number in range(1, useful)]
            return [worker.wait() for worker in workers]
        except KeyboardInterrupt:
            for worker in workers:  # they have been told, too: each keeps what it has
                worker.wait()
            raise

    in_rounds(study, start, "a process stopped with the error above")


def _fitting(study: Study, jobs: int, room: int, first: subprocess.Popen) -> int:
    """How many of `jobs` processes memory holds, by the first training that is over."""
    while (peak := study.peak_memory()) is None and first.poll() is None:
        time.sleep(POLL)
        study.follow()
    if peak is None:
        return 1  # it died before its training was over, or none will be
    fits = max(1, int(room / (HEADROOM * peak))) if peak else jobs
    if fits < jobs:
        study.say(
            f"{fits} of {jobs} processes at once: a training takes {peak / 2**30:.1f} GiB, others perhaps half as much "
            f"again, and {room / 2**30:.1f} GiB were free"
        )
    return min(fits, jobs)


def in_rounds(study: Study, start: Callable[[], list[int]], mistake: str) -> None:
    """Starts workers until nothing is left to do, or twice nothing comes of it.

    `start` runs workers to their end, and gives their exit codes. Raises KeyboardInterrupt or UserError (`mistake`)
    where a worker did.
    """
    study.follow()  # what is finished already was done by workers, too
    idle = 0  # rounds in which workers died and nothing else came of it
    while (before := len(study.todo())) and idle < 2:
        codes = start()
        study.follow()
        if 130 in codes:
            raise KeyboardInterrupt
        if 2 in codes:
            raise UserError(mistake)
        if not any(codes):
            return
        # One died. Whoever takes its run next knows that and calls it failed; the others go on.
        idle = idle + 1 if len(study.todo()) == before else 0


def free_memory() -> int:
    """Bytes that new processes can have."""
    return psutil.virtual_memory().available


def _share(number: int, jobs: int) -> dict[str, str]:
    """The environment of a process: its share of the threads, and one GPU."""
    threads = max(1, torch.get_num_threads() // jobs)
    found = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    gpus = visible_gpus()
    return found | ({VISIBLE: gpus[number % len(gpus)]} if gpus else {})


def leave_busy_cores() -> None:
    """Takes as many threads as cores are idle: waiting for busy ones takes longer. Not where OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        busy = psutil.cpu_percent(POLL) / 100 * (psutil.cpu_count() or 1)
        torch.set_num_threads(max(1, torch.get_num_threads() - round(busy)))


def keep_one_gpu() -> int:
    """Lets this process see one of several GPUs, before CUDA is used; returns how many there were.

    Transformers would spread every batch over all of them.
    """
    gpus = visible_gpus()
    if len(gpus) > 1:
        os.environ[VISIBLE] = gpus[0]
    return len(gpus)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    count = torch.cuda.device_count()
    named = listed(os.environ.get(VISIBLE, ""))
    return named[:count] if named else [str(number) for number in range(count)]
