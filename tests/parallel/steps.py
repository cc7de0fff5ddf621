"""LfUStep in a plain loop, in one process or a part of two: the gradient of one update of two micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from tiny import Float64Throughout, tiny_batch, tiny_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lfu import LfUStep
from lfu.model.anatomy import anatomy
from lfu.model.representations import answer_positions
from lfu.step.step import sft_loss

BATCHES = [tiny_batch(seed, rows=4) for seed in (0, 1)]
ITEMS = sum(len(answer_positions(batch["labels"])) for batch in BATCHES)

# name -> (kind of wrapper, theta, options of LfUStep, and `family` where it is not a Llama)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddp full lora": ("ddp", "full", {}),
    "ddp lora lora": ("ddp", "lora", {}),
    "ddp full steering, early": ("ddp", "full", {"auxiliary": "steering", "layers": "early"}),
    "ddp full two steps, cosine": ("ddp", "full", {"ascent_steps": 2, "consistency": "cosine"}),
    "ddp lora independent": ("ddp", "lora", {"ascent_batch": "independent"}),
    "ddp lora clean": ("ddp", "lora", {"direction": "clean"}),
    "ddp full own": ("ddp", "full", {"auxiliary": "own", "alpha": 0.01}),
    "ddp lora own, two steps": ("ddp", "lora", {"auxiliary": "own", "alpha": 0.01, "ascent_steps": 2}),
    "ddp full logit_kl": ("ddp", "full", {"consistency": "logit_kl"}),
    "ddp full every": ("ddp", "full", {"every": 2}),
    "fsdp2 lora every": ("fsdp2", "lora", {"every": 2}),
    "ddp full fused experts": ("ddp", "full", {"family": "mixtral"}),
    "fsdp2 full fused experts": ("fsdp2", "full", {"family": "mixtral"}),
    "fsdp2 full lora": ("fsdp2", "full", {}),
    "fsdp2 lora lora": ("fsdp2", "lora", {}),
    "fsdp2 full steering, early": ("fsdp2", "full", {"auxiliary": "steering", "layers": "early"}),
    "fsdp2 lora two steps, cosine": ("fsdp2", "lora", {"ascent_steps": 2, "consistency": "cosine"}),
    "fsdp2 full independent": ("fsdp2", "full", {"ascent_batch": "independent"}),
    "fsdp2 full clean": ("fsdp2", "full", {"direction": "clean"}),
}
# what goes wrong in the update's last micro-batch, for rank 1's rows alone; with every=2 it is one that is not due
TROUBLES = ("no labels", "nan loss")
TROUBLED = ("ddp full lora", "fsdp2 lora lora", "ddp full every", "fsdp2 lora every")


def tiny(family: str = "llama", theta: str = "full") -> Any:
    return tiny_model(family, theta=theta, num_hidden_layers=2)


def wrapped(kind: str, model: Any) -> Any:
    """As accelerate wraps: the blocks, then what is left."""
    if kind == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=False)
    mesh = init_device_mesh("cpu", (2,))
    parts = anatomy(model)
    for block in parts.blocks:
        fully_shard(block, mesh=mesh)
    decoder = parts.decoder
    fully_shard([decoder.norm, decoder.embed_tokens, parts.model.lm_head], mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


def part(batch: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The rank's half of the rows."""
    return {name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}


def update(
    case: str, rank: int | None = None, trouble: str | None = None
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """name -> gradient of theta, and the records; with `rank`, as one of two processes."""
    wrapper, theta, options = CASES[case]
    family, options = options.get("family", "llama"), {k: v for k, v in options.items() if k != "family"}
    with Float64Throughout():
        inner = model = tiny(family, theta)
        if rank is not None:
            model = wrapped(wrapper, model)
        step = LfUStep(model, **options)
        records = []
        for number, batch in enumerate(BATCHES):
            last = number == len(BATCHES) - 1
            other = BATCHES[1 - number] if options.get("ascent_batch") == "independent" else None
            if trouble == "no labels" and last:
                batch = batch | {"labels": torch.cat([batch["labels"][:2], torch.full_like(batch["labels"][2:], -100)])}
            if trouble == "nan loss" and last and rank in (None, 1):
                step.loss_fn = lambda *given: sft_loss(*given) * torch.nan
            if rank is not None:
                step.processes.reducing = lambda last=last: last
                batch, other = part(batch, rank), other and part(other, rank)
            with reductions(model, rank is None or last):
                record = step(batch, ascent_batch=other, num_items=ITEMS / (1 if rank is None else 2))
            records.append(asdict(record))
    return gradients(inner), records


def communication(wrapper: str) -> dict[str, int]:
    """How often theta's gradient is reduced in an update of two micro-batches, by SFT and by LfU."""
    counts = {}
    for method in ("sft", "lfu"):
        model = wrapped(wrapper, tiny())
        count = counts[method] = [0]
        with counted(model, count):
            step = LfUStep(model, lam=0.0 if method == "sft" else 5.0)
            for last in (False, True):
                if method == "lfu":
                    step.processes.reducing = lambda last=last: last
                with reductions(model, last):
                    step(part(BATCHES[0], 0))
    return {method: count[0] for method, count in counts.items()}


@contextmanager
def counted(model: Any, count: list[int]) -> Iterator[None]:
    if isinstance(model, DistributedDataParallel):

        def hook(state, bucket):
            count[0] += 1
            return allreduce_hook(None, bucket)

        model.register_comm_hook(None, hook)
        yield
        return
    # its name differs between versions of torch
    plain = {
        name: getattr(dist, name) for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, name)
    }

    def counting(scatter: Any) -> Any:
        def run(*given: Any, **named: Any) -> Any:
            count[0] += 1
            return scatter(*given, **named)

        return run

    for name, scatter in plain.items():
        setattr(dist, name, counting(scatter))
    yield
    for name, scatter in plain.items():
        setattr(dist, name, scatter)


@contextmanager
def reductions(model: Any, wanted: bool) -> Iterator[None]:
    """Without, as accelerate's no_sync has it."""
    if wanted:
        yield
    elif isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g
    return {name: whole(g).clone() for name, g in found.items() if g is not None}


def refusals() -> list[str]:
    """What LfUStep says to options that can't work on shards."""
    model, told = wrapped("fsdp2", tiny()), []
    for options in ({"auxiliary": "own"}, {"consistency": "logit_kl"}):
        try:
            LfUStep(model, **options)
        except ValueError as error:
            told.append(str(error))
    return told


def scopes(rank: int) -> dict[str, Any]:
    """Gradients and records of one micro-batch by the scope of the ascent."""
    found = {}
    for scope in ("global", "local"):
        model = wrapped("ddp", tiny())
        record = LfUStep(model, ascent_scope=scope)(part(BATCHES[0], rank))
        found[scope] = gradients(model.module), asdict(record)
    return found


def alike(wrapper: str | None) -> dict[str, Any]:
    """The record of the first micro-batch of all, of rows that are the same in each process."""
    model = tiny()
    with Float64Throughout():
        return asdict(LfUStep(model if wrapper is None else wrapped(wrapper, model))(part(BATCHES[0], 0)))


def everything(rank: int) -> dict[str, Any]:
    return {
        "updates": {case: update(case, rank) for case in CASES},
        "troubles": {(case, trouble): update(case, rank, trouble) for case in TROUBLED for trouble in TROUBLES},
        "communication": {wrapper: communication(wrapper) for wrapper in ("ddp", "fsdp2")},
        "alike": {wrapper: alike(wrapper) for wrapper in ("ddp", "fsdp2")},
        "refusals": refusals(),
        "scopes": scopes(rank),
    }
