"""One step in a process group of one, and, on a GPU alone, with its memory really full."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from tiny import DEVICE, gradients, relative_difference, tiny_batch, tiny_model
from torch.nn.parallel import DistributedDataParallel

from lfu import LfUStep

on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs --device cuda")


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone: NCCL on a GPU, else gloo."""
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("auxiliary", ["lora", "steering", "own"])
def test_one_process_of_a_group_is_one_process(group, auxiliary):
    alone, wrapped = tiny_model(), DistributedDataParallel(tiny_model())
    LfUStep(alone, auxiliary=auxiliary)(tiny_batch())
    LfUStep(wrapped, auxiliary=auxiliary)(tiny_batch())
    found = {name.removeprefix("module."): g for name, g in gradients(wrapped).items()}
    assert relative_difference(found, gradients(alone)) < 1e-12


SHAPE = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, head_dim=128, max_position_embeddings=1024)


@on_a_gpu
@pytest.mark.parametrize("theta", ["full", "lora"])
def test_a_second_pass_that_no_longer_fits_is_done_in_pieces(theta):
    """All memory is taken but for three quarters of what the second forward needs; the gradients are the same."""
    batch = tiny_batch(rows=16, length=512)
    used: list[int] = []

    @contextmanager
    def measured():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            used.append(torch.cuda.max_memory_allocated() - before)

    found = []
    blocks: list[torch.Tensor] = []

    @contextmanager
    def full():
        if not blocks:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0]
            blocks.append(torch.empty(free - int(0.75 * used[0]), dtype=torch.uint8, device=DEVICE))
        yield

    for second_pass in (measured, full):
        model = tiny_model(theta=theta, dtype=torch.float32, **SHAPE)
        for p in model.parameters():
            p.data.mul_(0.1 if p.dim() > 1 else 1)  # so wide a model would be chaotic with the weights of a narrow one
        record = LfUStep(model, second_pass=second_pass)(batch)
        assert record.skipped is None
        found.append((record, gradients(model)))
        del model
        torch.cuda.empty_cache()
    blocks.clear()
    assert found[0][0].pieces == 1
    assert found[1][0].pieces > 1
    assert relative_difference(found[1][1], found[0][1]) < 1e-3
