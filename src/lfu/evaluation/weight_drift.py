"""How far fine-tuning moved a model's weights, in all and part by part."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lfu.evaluation.hidden import parts_of
from lfu.support.annotations import Model

_CHUNK = 2**24  # weights taken to float64 at a time


@dataclass(frozen=True)
class Part:
    """One group of weights."""

    name: str
    parameters: int
    norm: float  # ||theta0||
    distance: float  # ||theta - theta0||
    relative: float | None  # the second over the first: 0 where nothing moved, None where it did from all zeros


@dataclass(frozen=True)
class WeightDrift:
    """Weight distance of the whole model and of parts of it."""

    overall: Part
    blocks: list[Part]  # 1..K
    kinds: list[Part]  # of module in the blocks
    outside: list[Part]


def weight_drift(base: Model | Path | None, tuned: Model) -> WeightDrift:
    """`||theta - theta0|| / ||theta0||`, in float64, over all parameters and over groups of them.

    Weights count as they act: an adapter as merged (see `effective_weights`). Tied weights count once; a head that is
    tied in `base` and trained apart in `tuned` is compared with the embedding that it started as.

    Args:
        base: theta0: a model; a file that `keep_weights` wrote, so that two models need not be in memory together; or
            None: `tuned`, a `PeftModel`, with its adapters off.
        tuned: theta: a model of the same shape.

    Raises ValueError: parameters or shapes that differ, or quantised weights.
    """
    theta0, place, tied = _start(base, tuned), _places(tuned), _tied_names(tuned)
    left = set(theta0)
    sums: dict[tuple[str, str], list[float]] = {}  # (group, name) -> parameters, squared norm, squared distance
    for name, theta in effective_weights(tuned):
        known = name if name in theta0 else tied.get(name, name)
        if known not in theta0:
            raise ValueError(f"the tuned model has a parameter that the base model lacks: {name}")
        left.discard(known)
        start = theta0[known]
        if start.shape != theta.shape:
            shapes = [" x ".join(map(str, t.shape)) for t in (start, theta)]
            raise ValueError(f"{name} is {shapes[0]} in the base model and {shapes[1]} in the tuned one")
        added = (theta.numel(), *_squares(start, theta))
        for group in (("overall", "all"), *place(name)):
            sums[group] = [a + b for a, b in zip(sums.get(group, (0, 0.0, 0.0)), added)]
    if left:
        raise ValueError(f"the base model has a parameter that the tuned model lacks: {min(left)}")
    parts = {group: _part(group[1], *total) for group, total in sums.items()}
    within = lambda kind: [part for (group, _), part in parts.items() if group == kind]
    return WeightDrift(parts["overall", "all"], within("block"), within("kind"), within("outside"))


def effective_weights(model: Model) -> Iterator[tuple[str, Tensor]]:
    """`(name, tensor)` of every parameter as it acts, by its name without PEFT's wrappers; tied ones once.

    An adapter is merged into a copy of its layer, one layer at a time.

    Raises ValueError: quantised weights, or prompt tuning.
    """
    yield from _walk(parts_of(model).model, "", set())


def _walk(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from _walk(_in_use(module), path, seen)
        return
    if isinstance(module, BaseTunerLayer):
        yield from _merged(module, path, seen)
        return
    yield from _unseen(module.named_parameters(recurse=False), path, seen)
    for name, child in module.named_children():
        yield from _walk(child, f"{path}{name}.", seen)


def _in_use(wrapper: Any) -> nn.Module:
    """The module that PEFT's wrapper runs: the trained copy (modules_to_save), token adapter, or the original."""
    if hasattr(wrapper, "token_adapter"):
        return wrapper.token_adapter
    active = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return wrapper.modules_to_save[active[0]] if active and not wrapper.disable_adapters else wrapper.original_module


@torch.no_grad()
def _merged(layer: Any, path: str, seen: set[int]) -> list[tuple[str, Tensor]]:
    """The base layer's parameters, in a copy of the layer with the active adapters merged if there are some."""
    unseen = _unseen(layer.get_base_layer().named_parameters(), path, seen)
    if not _active(layer):
        return unseen
    dtype = next(layer.get_base_layer().parameters()).dtype
    twin = copy.deepcopy(layer).to(torch.promote_types(dtype, torch.float32))  # 16 bits would round small changes away
    for wrapper in _active(twin):
        wrapper.merge()
    merged = dict(twin.get_base_layer().named_parameters())
    return [(name, merged[name.removeprefix(path)].detach()) for name, _ in unseen]


def _active(layer: Any) -> list[Any]:
    """The adapters of a layer that are on and not merged; those on several parameters of one module are nested."""
    inner = _active(layer.base_layer) if isinstance(layer.base_layer, BaseTunerLayer) else []
    return inner if layer.disable_adapters or layer.merged else [layer, *inner]


def _unseen(parameters: Iterable[tuple[str, Tensor]], path: str, seen: set[int]) -> list[tuple[str, Tensor]]:
    """Those that are not in `seen`, by their whole name; puts them there."""
    found = []
    for name, p in parameters:
        if id(p) in seen:
            continue
        seen.add(id(p))
        if not p.is_floating_point():
            raise ValueError(f"{path}{name} is quantised ({p.dtype}): load the model without quantisation")
        found.append((f"{path}{name}", p.detach()))
    return found


def _start(base: Any, tuned: Any) -> Mapping[str, Tensor]:
    """theta0 as a mapping."""
    if isinstance(base, Path):
        return load_file(base)  # mapped into memory, where the system can drop what was read
    if base is not None:
        return dict(effective_weights(base))
    if not hasattr(tuned, "disable_adapter"):
        raise ValueError(f"{type(tuned).__name__} is no PeftModel, so base=None says nothing: give the base model")
    with tuned.disable_adapter():
        return dict(effective_weights(tuned))  # no copies: adapters that are off are not merged


def _tied_names(model: Model) -> dict[str, str]:
    """The head's weight -> the embedding's, by name."""
    inner = parts_of(model).model
    paths = {id(module): name for name, module in inner.named_modules()}
    head, embedding = (paths.get(id(m)) for m in (inner.get_output_embeddings(), inner.get_input_embeddings()))
    return {f"{head}.weight": f"{embedding}.weight"}


def keep_weights(model: Model, path: Path) -> None:
    """Writes the model's effective weights to a safetensors file, for `weight_drift`."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in effective_weights(model)}, path)


def _places(model: Model) -> Callable[[str], list[tuple[str, str]]]:
    """A function from a parameter's name to the groups it belongs to: its block and kind, or `outside`."""
    parts = parts_of(model)
    paths = {id(module): name for name, module in parts.model.named_modules()}
    prefixes = {f"{paths[id(block)]}.": str(number) for number, block in enumerate(parts.blocks, start=1)}

    def place(name: str) -> list[tuple[str, str]]:
        for prefix, number in prefixes.items():
            if name.startswith(prefix):
                return [("block", number), ("kind", name.removeprefix(prefix).rpartition(".")[0])]
        return [("outside", name.rpartition(".")[0].rpartition(".")[2])]

    return place


def _squares(start: Tensor, theta: Tensor) -> tuple[float, float]:
    """(||start||^2, ||theta - start||^2), summed in float64, a chunk at a time."""
    norm = distance = 0.0
    for a, b in zip(start.flatten().split(_CHUNK), theta.flatten().split(_CHUNK)):
        a, b = a.double(), b.double().to(a.device)
        norm += float(a.square().sum())
        distance += float((b - a).square().sum())
    return norm, distance


def _part(name: str, parameters: float, norm: float, distance: float) -> Part:
    relative = 0.0 if distance == 0 else (distance / norm) ** 0.5 if norm else None
    return Part(name, int(parameters), norm**0.5, distance**0.5, relative)
