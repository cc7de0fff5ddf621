"""Peak memory: on a CPU of two updates of two micro-batches in a process of its own, on a GPU the allocator's count."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stepcost.cases import Case, make_batch, make_model
from stepcost.variants import Variant, make_step, parse_variant

MB = 2**20


def peak_memory(case: Case, variant: Variant, script: Path) -> dict[str, float]:
    """MB: `total`, and `above_model`, which leaves out what was there once the model was loaded."""
    command = [sys.executable, str(script), "--memory-of", json.dumps(asdict(case)), variant.text]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory ended with {done.returncode}: {done.stderr[-300:]}")
    return json.loads(done.stdout)


def of_this_process(case: dict[str, Any], variant: str) -> dict[str, float]:
    """Measured here: call it once, in a fresh process."""
    where = Case(**case)
    model = make_model(where)
    loaded = _status("VmRSS")
    two_updates(model, where, parse_variant(variant))
    peak = _status("VmHWM")
    return {"total": round(peak), "above_model": round(peak - loaded)}


def two_updates(model: Any, case: Case, variant: Variant) -> None:
    """Two AdamW updates of two micro-batches (or a sample) each, so that there are earlier gradients to keep."""
    run = make_step(variant, model, make_batch(case.batch, case.length, case.shape["vocab_size"], case.device))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    for _ in range(2):
        for _ in range(max(2, run.calls)):
            run()
        if variant.name != "oracle":  # it leaves no gradient on theta
            optimizer.step()
            optimizer.zero_grad()


@contextmanager
def on_gpu(found: dict[str, dict[str, float]], name: str, loaded: int) -> Iterator[None]:
    """Within it, what the allocator gives out at most, as `found[name]`, above what is there already.

    Args:
        loaded: bytes of the model.
    """
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield
    above = torch.cuda.max_memory_allocated() - before
    found[name] = {"total": round((loaded + above) / MB), "above_model": round(above / MB)}


def clear() -> None:
    """Gives back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _status(name: str) -> float:
    """A figure of this process's memory in MB. (Not getrusage: its maximum is inherited from the parent.)"""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(f"{name}:")).split()[1]) / 1024
