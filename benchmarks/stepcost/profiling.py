"""Where the time over the floor goes: by cause, and by kind of operation as torch.profiler sees it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from stepcost.cases import Case, make_batch, make_model
from stepcost.causes import causes_of
from stepcost.clock import Deadline, seconds
from stepcost.variants import Variant, make_step, parse_variant

Say = Callable[[str], None]
# group -> what an operation's name holds; the first that fits counts
GROUPS: dict[str, tuple[str, ...]] = {
    "optimizer": ("adam", "_foreach", "optimizer"),
    "attention": ("attention", "fmha"),
    "matrix products": ("::mm", "::addmm", "::bmm", "::baddbmm", "::linear", "::matmul", "gemm"),
    "loss (softmax, nll)": ("softmax", "nll_loss", "cross_entropy"),
    "copies and gathers": (
        "copy", "::cat", "clone", "index", "gather", "scatter", "embedding", "fill_", "zero", "::to", "contiguous",
        "memcpy", "memset",
    ),
    "views and allocation": (
        "view", "::t", "numpy_t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select",
        "as_strided",
        "empty", "resize", "detach", "alias", "reshape", "flatten", "narrow", "split", "chunk", "unbind", "result_type",
    ),
}  # fmt: skip
ELEMENTWISE, OTHER = "elementwise and sums", "python, dispatch, waiting"


def group_of(name: str) -> str:
    """The group of an operation such as `aten::addmm`."""
    name = name.lower()
    for group, parts in GROUPS.items():
        for part in parts:
            if name == f"aten{part}" or (not part.startswith("::") and part in name):
                return group
            if part.startswith("::") and part not in ("::t", "::to", "::mm") and part in name:
                return group
    return ELEMENTWISE


def profiled(run: Callable[[], Any], device: str) -> dict[str, float]:
    """Seconds of one call by group; what no operation accounts for is `OTHER`."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    start = time.perf_counter()
    with profile(activities=activities) as found:
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter() - start
    groups: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        if event.key.startswith("aten::"):  # on a GPU its kernels are listed beside it, and their time is its own too
            spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            groups[group_of(event.key)] += spent / 1e6
    groups[OTHER] = max(wall - sum(groups.values()), 0.0)
    return dict(groups)


def launched(run: Callable[[], Any], device: str) -> int:
    """Kernels that one call launches, copies included; on a CPU the operations that do work, which a GPU launches."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as found:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    if device == "cuda":
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())
    return sum(map(_counts, found.events()))


def _counts(event: Any) -> bool:
    """Whether an operation computes or moves something itself: one that only calls such operations does not.

    A `_foreach` operation counts as one, as on a GPU, though on a CPU it goes through its tensors one by one.
    """
    if not _works(event.name) or any(map(_works, (child.name for child in event.cpu_children))):
        return "_foreach_" in event.name
    parent = event.cpu_parent
    while parent is not None and "_foreach_" not in parent.name:
        parent = parent.cpu_parent
    return parent is None


def _works(name: str) -> bool:
    idle = ("aten::resolve_conj", "aten::resolve_neg", "aten::to", "aten::lift_fresh", "aten::is_same_size")
    return name.startswith("aten::") and name not in idle and group_of(name) != "views and allocation"


def profile_case(
    case: Case,
    variants: Sequence[Variant],
    rounds: int,
    deadline: Deadline,
    say: Say,
    clock: str,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Where the time over the floor goes. `keep` is given what there is, twice: the second half may run out of time.

    First `causes`: exact variant -> see `causes_of`, as far as the deadline allows. Then `operations`, seconds by
    group, of SFT, the bare second pass, the optimizer and each variant, in the shortest round. `left_over`: variant -
    SFT - second pass, what LfU spends above the padded floor. `launches`: see `launched`, of the same.
    """
    model = make_model(case)
    batch = make_batch(case.batch, case.length, case.shape["vocab_size"], case.device)
    causes: dict[str, dict[str, float]] = {}
    for v in variants:
        prefix = f"{case}: causes of {v.text}: "
        if shares := causes_of(case, v, model, batch, rounds, deadline, lambda text: say(prefix + text), clock):  # noqa: B023
            causes[v.text] = shares
    found = {"case": str(case), "causes": causes}
    keep(found)
    keep(found | _by_operation(case, variants, model, batch, rounds=3 if case.device == "cpu" else 1))


def _by_operation(
    case: Case, variants: Sequence[Variant], model: Any, batch: dict[str, torch.Tensor], rounds: int
) -> dict[str, Any]:
    runs = {name: make_step(parse_variant(name), model, batch) for name in ("sft", "decoder")}
    runs |= {v.text: make_step(v, model, batch) for v in variants}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    for run in runs.values():
        seconds(run, model, case.device)  # warm
    samples: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(rounds):
        for name, run in runs.items():
            model.zero_grad()
            samples[name].append(profiled(run, case.device))
        samples["optimizer"].append(profiled(optimizer.step, case.device))
    # the least disturbed one: medians by group would not add up
    parts = {name: min(found, key=lambda one: sum(one.values())) for name, found in samples.items()}
    names = [*GROUPS, ELEMENTWISE, OTHER]
    table = {name: {group: part.get(group, 0.0) for group in names} for name, part in parts.items()}
    left = {
        v.text: {g: table[v.text][g] - table["sft"][g] - table["decoder"][g] for g in names} for v in variants
    }  # fmt: skip
    launches = {name: launched(run, case.device) for name, run in runs.items()}
    return {"operations": table, "left_over": left, "launches": launches}
