"""The naive step, written straight from the equations: the definition of correct.

Three forwards and three backwards, float64, no hook and no line of code shared with the package: the auxiliary is
materialised in the weights (`W + scaling * B A`) or in wrapper modules, h and h' come out of those wrappers, and each
gradient is taken by `torch.autograd.grad`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


class Tap(nn.Module):
    """A block that adds `shift` (steering) to its output and keeps the sum for reading."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.shift: torch.Tensor | None = None
        self.preserve_norm = False
        self.kept: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)  # such as `attention_type`

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if self.shift is not None:
            if self.preserve_norm:
                norm = hidden.norm(dim=-1, keepdim=True)
                unit = hidden / norm + self.shift
                hidden = norm * unit / unit.norm(dim=-1, keepdim=True)
            else:
                hidden = hidden + self.shift
        self.kept = hidden
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])


class Oracle:
    """`l_SFT(theta) + lam * l_cons` and its gradient, for one micro-batch a call.

    Args:
        model: a causal language model (or PeftModel) in float64; it is copied, the copy's blocks are wrapped.
        layers: layer numbers in 1..K.
        blocks: where they are, below the causal language model.
        uncalled: endings of linear layers whose weight the model reads without calling them: no auxiliary.

        The other arguments are those of `LfUStep`, `LoRA` and `Steering`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        auxiliary: str,
        alpha: float,
        lam: float,
        consistency: str,
        layers: list[int],
        final_norm: bool = True,
        positions: str = "predict",
        direction: str = "perturbed",
        ascent_steps: int = 1,
        preserve_norm: bool = False,
        reduction: str = "mean",
        temperature: float = 0.1,
        scaling: float = 2.0,
        blocks: str | None = None,
        uncalled: tuple[str, ...] = (),
    ):
        duplicate: Any = copy.deepcopy(model)
        base = duplicate.get_base_model() if hasattr(duplicate, "get_base_model") else duplicate
        self.model = duplicate
        stack = base.transformer.h if hasattr(base, "transformer") else None
        stack = base.get_submodule(blocks) if blocks else stack if stack is not None else base.model.layers
        for i, block in enumerate(stack):
            stack[i] = Tap(block)
        self.taps: list[Any] = list(stack)
        self.base, self.decoder = base, base.base_model
        for tap in self.taps:
            tap.preserve_norm = preserve_norm
        self.auxiliary, self.alpha, self.lam, self.scaling = auxiliary, alpha, lam, scaling
        self.consistency, self.layers, self.final_norm = consistency, layers, final_norm
        self.positions, self.direction, self.ascent_steps = positions, direction, ascent_steps
        self.reduction, self.temperature = reduction, temperature
        self.uncalled = tuple(f".{name}.weight" for name in uncalled)
        self.theta = {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def linear_weights(self) -> dict[str, bool]:
        """Weights of all linear layers of all blocks, in module order, adapters' own left out: name -> is (in, out).

        Then the fused experts, `(experts, out, in)`. A weight that several layers share comes once.
        """
        kinds = {"Linear", "Conv1D"}
        linear = {
            f"{name}.weight": type(module).__name__ == "Conv1D"
            for name, module in self.model.named_modules()
            if kinds & {kind.__name__ for kind in type(module).__mro__}
            and ".block." in name
            and "lora_" not in name
            and not hasattr(module, "base_layer")  # PEFT's wrapper is called Linear too
        }
        weights = dict(self.model.named_parameters())
        experts = {
            name: self.model.get_submodule(name.rpartition(".")[0]).is_transposed
            for name, p in weights.items()
            if p.dim() == 3 and "experts" in name
        }
        return {
            name: transposed
            for name, transposed in (linear | experts).items()
            if name in weights and not name.replace(".base_layer", "").endswith(self.uncalled)
        }

    # -- theta_aux -----------------------------------------------------------------------------------------------------

    def start(self, a_matrices: list[torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The zero auxiliary. `a_matrices`: the A of each linear layer, in the order of `linear_weights`."""
        weights = dict(self.model.named_parameters())
        aux: dict[str, torch.Tensor] = {}
        device = next(self.model.parameters()).device
        if self.auxiliary == "lora":
            assert a_matrices is not None
            for name, a in zip(self.linear_weights(), a_matrices, strict=True):
                *experts, rank, width = a.shape
                out = weights[name][0].numel() // width if experts else weights[name].numel() // width
                aux[f"{name}/A"] = a.clone()
                aux[f"{name}/B"] = torch.zeros(*experts, out, rank, dtype=a.dtype, device=device)
        elif self.auxiliary == "steering":
            width = self.base.config.hidden_size
            aux = {str(i): torch.zeros(width, dtype=torch.float64, device=device) for i in range(len(self.taps))}
        else:
            aux = {name: torch.zeros_like(p) for name, p in self.theta.items()}
        return {name: t.requires_grad_() for name, t in aux.items()}

    def theta_alone(self) -> dict[str, torch.Tensor]:
        for tap in self.taps:
            tap.shift = None
        return dict(self.model.named_parameters())

    def theta_aux(self, aux: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters of the undesirable model; for `own` theta + aux, still differentiable in theta."""
        weights = self.theta_alone()
        if self.auxiliary == "lora":
            for name, transposed in self.linear_weights().items():
                delta = self.scaling * aux[f"{name}/B"] @ aux[f"{name}/A"]
                weights[name] = weights[name] + (delta.mT if transposed else delta)
        elif self.auxiliary == "steering":
            for i, tap in enumerate(self.taps):
                tap.shift = aux[str(i)]
        else:
            for name in self.theta:
                weights[name] = weights[name] + aux[name]
        return weights

    # -- the equations -------------------------------------------------------------------------------------------------

    def forward(self, weights: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> tuple[Any, dict]:
        """Logits and h[l], l = 1..K, at every token."""
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        last: dict[str, torch.Tensor] = {}
        head = self.base.get_output_embeddings()
        original = head.forward

        def read_head_input(x: torch.Tensor) -> torch.Tensor:  # the head's input IS the final-normed last state
            last["h"] = x
            return original(x)

        head.forward = read_head_input
        own = [(module, dict(module._parameters), dict(module._buffers)) for module in self.model.modules()]
        try:
            logits = functional_call(self.model, weights, (), {**inputs, "use_cache": False}, tie_weights=True).logits
        finally:
            del head.forward
            for module, parameters, buffers in own:  # PEFT's adapter on a parameter registers it anew in each forward
                module._parameters, module._buffers = parameters, buffers
        hidden = {i: tap.kept for i, tap in enumerate(self.taps, start=1)}
        if self.final_norm:
            hidden[len(self.taps)] = last["h"]
        return logits, hidden

    def sft(self, logits: torch.Tensor, labels: torch.Tensor, items: float) -> torch.Tensor:
        """Eq. 1."""
        b, t = (labels[:, 1:] != -100).nonzero(as_tuple=True)  # answer token at t + 1, predicted at t
        return -logits.log_softmax(-1)[b, t, labels[b, t + 1]].sum() / items

    def ascent(self, aux: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> float:
        """Eq. 2, on aux in place; returns ||g||."""
        logits, _ = self.forward(self.theta_aux(aux), batch)
        loss = self.sft(logits, batch["labels"], float((batch["labels"][:, 1:] != -100).sum()))
        grads = torch.autograd.grad(loss, list(aux.values()), allow_unused=True)
        norm = torch.sqrt(sum((g**2).sum() for g in grads if g is not None))  # type: ignore[arg-type]
        with torch.no_grad():
            for t, g in zip(aux.values(), grads):
                if g is not None:
                    t += self.alpha * g / norm
        return float(norm)

    def distance(self, target: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """The sum over tokens `(N, d)` of one layer's consistency."""
        if self.consistency == "mse":
            squared = (target - moving) ** 2
            return squared.mean(-1).sum() if self.reduction == "mean" else squared.sum()
        if self.consistency == "cosine":
            return (1 - (target * moving).sum(-1) / (target.norm(dim=-1) * moving.norm(dim=-1))).sum()
        if self.consistency == "contrastive":
            unit_m = moving / moving.norm(dim=-1, keepdim=True)
            unit_t = target / target.norm(dim=-1, keepdim=True)
            scores = unit_m @ unit_t.T / self.temperature
            return (scores.logsumexp(-1) - scores.diagonal()).sum()
        p = target.softmax(-1)  # Eq. 7; target and moving are logits
        return (p * (p.log() - moving.softmax(-1).log())).sum()

    def select(self, logits: torch.Tensor, hidden: dict, labels: torch.Tensor) -> dict[int, torch.Tensor]:
        """The compared tensors `(N, .)` a layer: at t-1 for an answer token at t (paper), or at t (code)."""
        shift = 1 if self.positions == "predict" else 0
        b, t = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        t = t + 1 - shift
        if self.consistency == "logit_kl":
            return {0: logits[b, t]}
        return {layer: hidden[layer][b, t] for layer in self.layers}

    def cons(self, clean: dict[int, torch.Tensor], moved: dict[int, torch.Tensor], items: float) -> torch.Tensor:
        """Eq. 5, with the gradient where `direction` puts it."""
        if self.direction == "clean":
            clean, moved = moved, clean
        terms = [self.distance(clean[layer].detach(), moved[layer]) for layer in clean]
        return torch.stack(terms).sum() / len(terms) / items

    def __call__(
        self,
        batch: dict[str, torch.Tensor],
        *,
        a_matrices: list[torch.Tensor] | None = None,
        ascent_batch: dict[str, torch.Tensor] | None = None,
        items: float | None = None,
        held: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """Eq. 6: the losses and `grads`, name -> gradient of the total for each parameter of theta.

        `held`: an auxiliary moved before, used instead of a fresh ascent.
        """
        items = float((batch["labels"][:, 1:] != -100).sum()) if items is None else items
        theta = list(self.theta.values())
        logits, hidden = self.forward(self.theta_alone(), batch)
        clean = self.select(logits, hidden, batch["labels"])
        loss = self.sft(logits, batch["labels"], items)
        sft_grads = torch.autograd.grad(loss, theta, allow_unused=True, retain_graph=True)
        norm = 0.0
        if held is None:
            held = self.start(a_matrices)
            for step in range(self.ascent_steps):
                first = self.ascent(held, ascent_batch or batch)
                norm = first if step == 0 else norm
        moved_logits, moved_hidden = self.forward(self.theta_aux({k: v.detach() for k, v in held.items()}), batch)
        consistency = self.cons(clean, self.select(moved_logits, moved_hidden, batch["labels"]), items)
        cons_grads = torch.autograd.grad(self.lam * consistency, theta, allow_unused=True)
        names = [name.replace(".block.", ".") for name in self.theta]  # as in the model that was copied
        zero = lambda g, p: torch.zeros_like(p) if g is None else g
        sft = [zero(g, p) for g, p in zip(sft_grads, theta)]
        cons = [zero(g, p) for g, p in zip(cons_grads, theta)]
        return {
            "sft_loss": float(loss.detach()),
            "consistency": float(consistency.detach()),
            "norm": norm,
            "grads": {name: a + b for name, a, b in zip(names, sft, cons)},
            "sft_grads": dict(zip(names, sft)),
            "cons_grads": dict(zip(names, cons)),
            "aux": held,
        }
