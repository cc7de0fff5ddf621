"""OSF: the weights' largest singular directions stay, and what is trained is orthogonal to them. By PEFT."""

import torch
from peft import LoraConfig, OSFConfig, PeftConfig
from peft.tuners.osf.layer import OSFLayer

from lfu.methods.adapters import AdapterMethod, replaced
from lfu.methods.knobs import knob
from lfu.methods.run import Preparation, Trainer
from lfu.model.precision import wide


class OSF(AdapterMethod):
    """`W = U_k S_k V_k^T + U S V^T`: the k largest singular directions stay; U, S, V are trained, orthogonal to them.

    PEFT projects the gradients of U and V off U_k and V_k, as in the paper, but Adam's step along them is not
    orthogonal any more. With `project="step"` U and V themselves are projected after each update, so that U_k and V_k
    really stay. It takes the place of the LoRA adapter, of whose settings only the targeted layers count.
    """

    name = "osf"
    summary = "training orthogonal to the largest singular directions, in place of LoRA"
    source = "Nayak et al. 2025, arXiv 2504.07097 (through PEFT's OSFConfig; its default keeps half)"
    protects = "the weights' largest singular directions"
    once = "an SVD of every targeted layer, also when the adapter is loaded"
    decomposes = True

    keep: float = knob(0.5, "singular directions that stay fixed: a share, below 1, or a number (PEFT: 0.5)", above=0)
    project: str = knob("step", "what stays orthogonal: step (ours), or gradient (PEFT)", choices=("step", "gradient"))

    def __post_init__(self) -> None:
        if self.keep >= 1 and self.keep != int(self.keep):
            raise ValueError(f"osf.keep must be a share below 1 or a whole number of directions, got {self.keep:g}")

    def started(self, config: LoraConfig, run: Preparation) -> PeftConfig:
        # before 0.21 the layer multiplies with the decomposition, and rounding that moves the untouched model
        if run.model.dtype.itemsize < 4 and not hasattr(OSFLayer, "get_delta_weight"):
            kind = str(run.model.dtype).removeprefix("torch.")
            raise self._error(f"needs PEFT 0.21 or newer for a model in {kind}: pip install --upgrade peft")
        rank = self.keep if self.keep < 1 else int(self.keep)
        return replaced(config, OSFConfig, run, self.name, effective_rank=rank)

    def setup(self, trainer: Trainer) -> None:
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
                now = layer.osf_svd_params[adapter]
                U_high, V_high = (dict(fixed.items()).get(adapter) for fixed in (layer._osf_U_high, layer._osf_V_high))
                self._factors.append(_Factor(now["U_low"], _start(layer, "U_low", adapter), U_high))
                V0, V_high = _start(layer, "V_low", adapter).T, None if V_high is None else V_high.T
                self._factors.append(_Factor(now["V_low"].T, V0, V_high))

    @torch.no_grad()
    def after_update(self, trainer: Trainer) -> None:
        for factor in self._factors:
            factor.project()


def _start(layer: OSFLayer, name: str, adapter: str) -> torch.Tensor:
    """U or V as the decomposition gave it. PEFT 0.18 keeps no copy, and before training it is what is there."""
    kept = getattr(layer, f"_osf_{name}_init", None)
    return layer.osf_svd_params[adapter][name].detach().clone() if kept is None else kept[adapter]


class _Factor:
    """U or V of one layer, `(rows, r)`, whose distance from its start is kept in the free directions."""

    def __init__(self, now: torch.Tensor, start: torch.Tensor, high: torch.Tensor | None):
        # PEFT keeps the fixed directions where the factor is not square; else its start spans all the free ones
        self.now, self.start, self.fixed = now, start, high is not None
        # of a model in bf16 the columns are orthonormal to 1e-3 only, and this is applied thousands of times
        self.basis = torch.linalg.qr(wide(start if high is None else high)).Q

    def project(self) -> None:
        change = wide(self.now) - wide(self.start)
        inside = self.basis @ (self.basis.T @ change)
        self.now.copy_(wide(self.start) + (change - inside if self.fixed else inside))
