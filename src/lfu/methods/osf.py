"""OSF: the weights' largest singular directions stay, and what is trained is orthogonal to them. By PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import OSFConfig
from peft.tuners.osf.layer import OSFLayer

from lfu.methods.adapters import refuse_what_is_no_lora
from lfu.methods.method import Method, Preparation, knob
from lfu.methods.weights import refuse_sharded_launch
from lfu.model.precision import wide


@dataclass
class OSF(Method):
    """`W = U_k S_k V_k^T + U S V^T`: the k largest singular directions stay; U, S, V are trained, orthogonal to them.

    As in the paper, PEFT projects the gradients of U and V off U_k and V_k. Adam's step along a projected gradient is
    not orthogonal any more (it scales every entry by its own factor); with `project="step"`, the default here, U and V
    themselves are projected after each update, so that U_k and V_k really stay what they are. `project="gradient"` is
    PEFT's alone.

    It takes the place of the LoRA adapter, of whose settings only the targeted layers count. k is half the rank of
    each weight by default, so that about half as many parameters are trained as the weights have.
    """

    name: ClassVar[str] = "osf"
    summary: ClassVar[str] = "training orthogonal to the largest singular directions, in place of LoRA"
    source: ClassVar[str] = "Nayak et al. 2025, arXiv 2504.07097 (through PEFT's OSFConfig; its default keeps half)"
    protects: ClassVar[str] = "the weights' largest singular directions"
    once: ClassVar[str] = "an SVD of every targeted layer, also when the adapter is loaded"
    places: ClassVar[tuple[str, ...]] = ("adapter",)

    keep: float = knob(0.5, "singular directions that stay: a share (below 1) or a number of each weight's", above=0)
    project: str = knob(
        "step", "what is kept orthogonal: step (exact), or gradient (PEFT)", choices=("step", "gradient")
    )

    def __post_init__(self) -> None:
        if self.keep >= 1 and self.keep != int(self.keep):
            raise ValueError(f"osf.keep must be a share below 1 or a whole number of directions, got {self.keep:g}")

    def adapter(self, config: Any, run: Preparation) -> OSFConfig:
        refuse_sharded_launch(run.args, self.name)
        refuse_what_is_no_lora(self.name, config, run.model)
        if getattr(run.model, "quantization_method", None) is not None:
            raise ValueError(
                "method 'osf' decomposes the weights, and those of this model are quantised: load it without"
            )
        run.say("osf: takes the place of the LoRA adapter, whose rank, alpha and dropout do not apply")
        return OSFConfig(
            effective_rank=self.keep if self.keep < 1 else int(self.keep),
            target_modules=config.target_modules,
            task_type=config.task_type,
        )

    def setup(self, trainer: Any) -> None:
        layers = [module for module in trainer.anatomy.model.modules() if isinstance(module, OSFLayer)]
        if not layers:
            raise ValueError("method 'osf' adapts nn.Linear layers, and none of the targeted ones is one")
        self._factors: list[_Factor] = []
        for layer in layers:
            (adapter,) = layer.active_adapters
            if not layer.osf_svd_params[adapter]["S_low"].numel():
                rank = min(layer.in_features, layer.out_features)
                raise ValueError(f"osf.keep={self.keep:g} leaves nothing to train in a layer of rank {rank}: lower it")
            if self.project == "step":
                self._factors += _factors(layer, adapter)

    def after_update(self, trainer: Any) -> None:
        for factor in self._factors:
            factor.project()


class _Factor:
    """U or V^T of one layer, whose distance from its start is kept in the free directions.

    Attributes:
        now, start: `(rows, r)`.
        basis: `(rows, n)`, orthonormal columns; in float32 or wider.
        fixed: whether the basis spans the fixed directions, else all the free ones.
    """

    def __init__(self, now: torch.Tensor, start: torch.Tensor, basis: torch.Tensor, fixed: bool):
        self.now, self.start, self.fixed = now, start, fixed
        # of a model in bf16 the columns are orthonormal to 1e-3 only, and this is applied thousands of times
        self.basis = torch.linalg.qr(wide(basis)).Q

    @torch.no_grad()
    def project(self) -> None:
        change = wide(self.now) - wide(self.start)
        inside = self.basis @ (self.basis.T @ change)
        self.now.copy_(wide(self.start) + (change - inside if self.fixed else inside))


def _factors(layer: Any, adapter: str) -> list[_Factor]:
    """PEFT keeps the fixed directions where the factor is not square; else the free ones, U's and V's start."""
    now = layer.osf_svd_params[adapter]
    U0, V0 = layer._osf_U_low_init[adapter], layer._osf_V_low_init[adapter].T
    U_fixed, V_fixed = adapter in layer._osf_U_high, adapter in layer._osf_V_high
    return [
        _Factor(now["U_low"], U0, layer._osf_U_high[adapter] if U_fixed else U0, U_fixed),
        _Factor(now["V_low"].T, V0, layer._osf_V_high[adapter].T if V_fixed else V0, V_fixed),
    ]
