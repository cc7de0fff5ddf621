"""Where the methods' terms point: towards what is learned, its rewording, or what should be kept?

To first order LfU adds `c G g` to SFT's gradient g, with `G = J^T J` and J the derivative of the compared hidden states
with respect to theta: it favours what moves the hidden states of many training rows together. Measured for each run:

- the cosine of each term's gradient with that of losses that training does not see: a step down the term lowers a loss
  if it is positive;
- the top eigenvectors of G, and how much of each of these gradients lies in their span.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from testbed.gradients import Batch, Gradient, mean_where, token_losses
from testbed.llama import hidden_states
from testbed.material import Bed
from testbed.setting import Setting
from testbed.skills import OTHERS
from testbed.theta import AllWeights, Tensors, norm, per_run, plus, ratio
from testbed.tune import Run

TOP, ROUNDS = 8, 6  # eigenvectors; rounds of subspace iteration
STEP = 0.1  # length of the step that G is read off, LfU's own alpha
Found = dict[str, list[float]]


def directions(bed: Bed, setting: Setting) -> Found:
    """After the training of `setting`: name of a term or loss -> a value a run."""
    torch.manual_seed(1)
    run = Run(setting, bed.material(setting))
    run.train()
    start, theta = run.material.start, run.theta
    assert isinstance(theta, AllWeights)
    batch = Batch(run.material.ids, run.material.answer)
    terms = {"sft": Gradient(Setting(setting.rows, 1, 1.0), theta)(batch)[0]}
    for auxiliary in ("own", "lora", "steering"):
        made = Gradient(replace(Setting(setting.rows, 1, 1.0), auxiliary=auxiliary), theta, lam=1.0)
        terms[f"lfu {auxiliary}"] = [t - g for t, g in zip(made(batch)[0], terms["sft"])]
    if setting.steps > 1:
        terms["pull"] = [t - start[name] for name, t in zip(theta.names, theta.tensors)]
    losses = {name: _gradient(theta, *rows) for name, rows in _unseen(bed).items()}
    top, values = _top(theta, batch, terms["sft"])
    found: Found = {f"eigenvalue {n + 1}": v.tolist() for n, v in enumerate(values)}
    for term, gradient in terms.items():
        found |= {f"{term} with {name}": _cosine(gradient, other).tolist() for name, other in losses.items()}
    for name, gradient in (terms | losses).items():
        found[f"in the top: {name}"] = _share(gradient, top).tolist()
    return found


def _unseen(bed: Bed) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Test rows, 60 a loss or so: ids and where the answers are."""
    few = lambda name, count: [t[:count] for t in bed.sets[name]]
    width = max(bed.sets[name][0].shape[1] for name in OTHERS)
    pad = lambda t: torch.nn.functional.pad(t, (0, width - t.shape[1]))
    old = [torch.cat([pad(few(name, 10)[part]) for name in OTHERS]) for part in (0, 1)]
    return {
        "target": (few("target", 60)[0], few("target", 60)[1]),
        "reworded": (few("reworded", 60)[0], few("reworded", 60)[1]),
        "others": (old[0], old[1]),
    }


def _gradient(theta: AllWeights, ids: torch.Tensor, answer: torch.Tensor) -> Tensors:
    weights, leaves = theta.weights()
    ids, answer = (t.expand(len(leaves[0]), -1, -1) for t in (ids, answer))
    nll, _ = token_losses(weights, hidden_states(weights, ids)[-1], ids)
    return list(torch.autograd.grad(mean_where(nll, answer[:, :, 1:]).sum(), leaves))


def _times_g(theta: AllWeights, batch: Batch, along: Tensors) -> Tensors:
    """G times a direction, read off a step of length `STEP` along it."""
    clean, _ = theta.weights()
    with torch.no_grad():
        targets = [h[:, :, :-1] for h in hidden_states(clean, batch.ids)]
    length = ratio(torch.full_like(norm(along), STEP), norm(along))
    weights, leaves = theta.weights(plus(theta.tensors, along, length))
    where = batch.answer[:, :, 1:]
    apart = [
        mean_where((h[:, :, :-1] - t).square().mean(-1), where)
        for h, t in zip(hidden_states(weights, batch.ids), targets)
    ]
    return list(torch.autograd.grad(torch.stack(apart).mean(0).sum() / (2 * STEP), leaves))


def _top(theta: AllWeights, batch: Batch, first: Tensors) -> tuple[list[Tensors], list[torch.Tensor]]:
    """The leading eigenvectors of G by subspace iteration, orthonormal, and their eigenvalues `(S,)`."""
    vectors = [first, *([torch.randn_like(t) for t in first] for _ in range(TOP - 1))]
    values: list[torch.Tensor] = []
    for _ in range(ROUNDS):
        vectors = _orthonormal([_times_g(theta, batch, v) for v in _orthonormal(vectors)])
    for v in vectors:
        values.append(_dot(v, _times_g(theta, batch, v)))
    return vectors, values


def _orthonormal(vectors: list[Tensors]) -> list[Tensors]:
    done: list[Tensors] = []
    for v in vectors:
        for w in done:
            v = plus(v, w, -_dot(v, w))
        size = norm(v)
        done.append([t * per_run(ratio(torch.ones_like(size), size), t) for t in v])
    return done


def _dot(one: Tensors, other: Tensors) -> torch.Tensor:
    return torch.stack([(a * b).flatten(1).sum(1) for a, b in zip(one, other)]).sum(0)


def _cosine(one: Tensors, other: Tensors) -> torch.Tensor:
    return ratio(_dot(one, other), norm(one) * norm(other))


def _share(gradient: Tensors, basis: list[Tensors]) -> torch.Tensor:
    """How much of its square lies in the span of an orthonormal basis."""
    inside = torch.stack([_dot(gradient, v).square() for v in basis]).sum(0)
    return ratio(inside, norm(gradient).square())
