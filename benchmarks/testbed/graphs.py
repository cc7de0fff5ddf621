"""Repeating one update many times: captured once as a CUDA graph where that works, else run as it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

use_graphs = True  # false once capturing has failed three times, or where the user says so
failures = 0


def repeat(update: Callable[[], None], times: int, state: Sequence[torch.Tensor]) -> None:
    """Runs `update` so many times.

    Args:
        update: reads and writes tensors alone: no value of it reaches Python.
        state: every tensor that it changes; they are put back after the trial updates that a capture needs.
    """
    global use_graphs, failures
    done = 0
    if state[0].is_cuda and times > 8 and use_graphs:
        kept = [t.detach().clone() if t.any() else None for t in state]  # most of it is zero at the start
        try:
            graph = _captured(update)
        except RuntimeError as error:
            print(f"no CUDA graph ({str(error).splitlines()[0]}): going on without", file=sys.stderr, flush=True)
            failures += 1
            use_graphs, graph = failures < 3, None
            torch.cuda.synchronize()
        with torch.no_grad():
            for t, old in zip(state, kept):
                if old is None:
                    t.zero_()
                else:
                    t.copy_(old)
        del kept
        if graph is not None:
            for _ in range(times):
                graph.replay()
            torch.cuda.synchronize()
            del graph
            torch.cuda.empty_cache()  # its memory: the next graph has its own, and others may use this machine too
            done = times
    for _ in range(times - done):
        update()


def _captured(update: Callable[[], None]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            update()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    return graph
