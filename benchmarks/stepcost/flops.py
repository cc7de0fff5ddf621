"""Arithmetic: what a step really computes, beside the floor that no exact step can go below.

The floor is SFT plus a forward and backward of the decoder, without the head, over what the second pass must run:
`padded`, the whole micro-batch; `unpadded`, each row up to the position that predicts its last label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lfu.model.anatomy import anatomy
from lfu.step.step import sft_loss
from stepcost.cases import Case, make_batch, make_model, needed_lengths


def count(run: Callable[[], Any]) -> int:
    """Multiplications and additions of the matrix products in `run`, forward and backward.

    Attention counts as two products forward and four backward, whatever kernel does it, mask or not.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_attention())
    with counter:
        run()
    return counter.get_total_flops()


def floors(case: Case) -> dict[str, Any]:
    """Counted on the meta device: parameters, FLOPs of the passes, and the floors as multiples of SFT's.

    Of one layer and of two: each further layer adds as much as the second.
    """
    lengths = needed_lengths(make_batch(case.batch, case.length, case.shape["vocab_size"])["labels"])
    one, two = (_counted(replace(case, device="meta", layers=layers), lengths) for layers in (1, 2))
    further = case.shape["num_hidden_layers"] - 1
    counted = {
        what: {part: n + further * (two[what][part] - n) for part, n in parts.items()} for what, parts in one.items()
    }
    sft, padded, unpadded = (counted[what] for what in ("sft", "second_pass", "second_pass_unpadded"))
    total = {name: part["forward"] + part["backward"] for name, part in (("s", sft), ("p", padded), ("u", unpadded))}
    rows, length = case.batch, case.length
    return {
        **counted.pop("weights"),
        **counted,
        "unpadded_share": sum(lengths) / (rows * length),
        "floor_padded": 1 + total["p"] / total["s"],
        "floor_unpadded": 1 + total["u"] / total["s"],
        "naive": 3.0,
    }


def _counted(case: Case, lengths: list[int]) -> dict[str, dict[str, int]]:
    """Weights and FLOPs of a case, whose rows have so many tokens that the second pass needs."""
    model = make_model(case, attention="eager")
    each = [_pass(model, 1, n, head=False) for n in lengths]
    return {
        "weights": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "sft": _pass(model, case.batch, case.length, head=True),
        "second_pass": _pass(model, case.batch, case.length, head=False),
        "second_pass_unpadded": {part: sum(one[part] for one in each) for part in ("forward", "backward")},
    }


def _pass(model: Any, rows: int, length: int, *, head: bool) -> dict[str, int]:
    """FLOPs of forward and backward over `(rows, length)` tokens; without `head` the decoder alone."""
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kept: list[torch.Tensor] = []

    def forward() -> None:
        if head:
            kept.append(sft_loss(model, inputs | {"labels": ids}, 1.0))
        else:
            kept.append(anatomy(model).decoder(**inputs, use_cache=False).last_hidden_state.sum())

    counted = {"forward": count(forward), "backward": count(lambda: kept[0].backward())}
    model.zero_grad()
    return counted


def _attention() -> dict[Any, Callable[..., int]]:
    """Every fused kernel by one rule: torch's own leave the CPU's out, and want as many heads for k as for q."""
    aten = torch.ops.aten
    forward = ["flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"]
    found: dict[Any, Callable[..., int]] = {}
    for kind in forward:
        name = f"_scaled_dot_product_{kind}"
        if hasattr(aten, name):
            found[getattr(aten, name)] = lambda q, k, v, *rest, **more: _two_products(q, k, v)
        back = f"{name.removesuffix('_for_cpu')}{'_for_cpu' * name.endswith('_for_cpu')}_backward"
        if hasattr(aten, back):
            found[getattr(aten, back)] = lambda gradient, q, k, v, *rest, **more: 2 * _two_products(q, k, v)
    return found


def _two_products(q: Any, k: Any, v: Any) -> int:
    """q k^T and p v: shapes `(B, heads, T, d)`."""
    b, heads, t, d = q
    return 2 * b * heads * t * k[2] * (d + v[3])
