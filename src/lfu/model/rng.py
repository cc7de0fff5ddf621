"""Randomness: one source for the auxiliaries, and the same dropout masks twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

Generators = Callable[[torch.device], torch.Generator]


def generators(seed: int, index: int) -> Generators:
    """A generator per device, for micro-batch number `index` of a run seeded `seed`.

    Devices count in the order in which they are used, so that processes with a GPU each draw the same.
    Nothing is carried from one micro-batch to the next, so a resumed run draws what the uninterrupted one would.
    """
    made: dict[torch.device, torch.Generator] = {}

    def on(device: torch.device) -> torch.Generator:
        if device not in made:
            mixed = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + len(made)) % 2**63
            made[device] = torch.Generator(device).manual_seed(mixed)
        return made[device]

    return on


# probabilities of masks that are drawn without a module of torch.nn: attention's kernels, functional dropout
_PROBABILITIES = (
    "attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "hidden_dropout", "activation_dropout",
    "residual_dropout", "dropout", "layerdrop",
)  # fmt: skip


def draws_masks(model: nn.Module, config: Any) -> bool:
    """Whether a forward in training mode draws dropout masks, as far as modules and `config` tell."""
    if any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules()):
        return True
    values = (getattr(config, name, None) for name in _PROBABILITIES)
    return any(isinstance(value, float) and value > 0 for value in values)


class Replay:
    """Remembers the random state at its making; `with replay():` runs from that state and then puts back today's.

    So the perturbed pass sees the dropout masks and NEFTune noise of the clean one, and the run's own stream of
    random numbers is the one that plain SFT would have had.
    """

    def __init__(self, devices: Iterable[torch.device], enabled: bool = True):
        self.enabled = enabled
        self.devices = sorted({d for d in devices if d.type == "cuda"}, key=str)
        self.state = (torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in self.devices])

    def drew(self) -> bool:
        """Whether anything has drawn random numbers since: dropout, embedding noise."""
        then = [self.state[0], *self.state[1]]
        now = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self.devices)]
        return any(not torch.equal(a, b) for a, b in zip(then, now))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if not self.enabled:
            yield
            return
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.state[0])
            for device, state in zip(self.devices, self.state[1]):
                torch.cuda.set_rng_state(state, device)
            yield
