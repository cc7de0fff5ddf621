"""Two processes of one group on this machine (gloo, CPU)."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import torch

SIZE = 2


def both(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """`function(rank, *args)` in two processes of one group: what each returned, rank 0's first.

    Raises:
        AssertionError: one of them raised; the message is its traceback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [forked.process(_work, function, rank, str(port), folder, args) for rank in range(SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(800)
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    told = [folder / f"{rank}.error" for rank in range(SIZE)]
    assert not any(path.exists() for path in told), "\n".join(p.read_text() for p in told if p.exists())
    assert not alive, "the processes wait for each other"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(SIZE)]


def _work(function: Callable[..., Any], rank: int, port: str, folder: Path, args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE), "LOCAL_WORLD_SIZE": str(SIZE),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=SIZE)
        torch.save(function(rank, *args), folder / f"{rank}.pt")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)  # the other one waits for a message that will not come
