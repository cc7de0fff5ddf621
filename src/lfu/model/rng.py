"""Randomness: one source for the auxiliaries, and the same dropout masks twice."""

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
    random numbers is the one that plain SFT would have had. The CPU's state is kept beside that of the `devices`.
    """

    def __init__(self, devices: Iterable[torch.device], enabled: bool = True):
        self.enabled = enabled
        self.devices = sorted({d for d in devices if d.type not in ("cpu", "meta")}, key=str)
        self.state = self._now()

    def _now(self) -> list[torch.Tensor]:
        return [
            torch.get_rng_state(),
            *(torch.get_device_module(d.type).get_rng_state(*_number(d)) for d in self.devices),
        ]

    def _put(self, state: list[torch.Tensor]) -> None:
        torch.set_rng_state(state[0])
        for device, its in zip(self.devices, state[1:]):
            torch.get_device_module(device.type).set_rng_state(its, *_number(device))

    def drew(self) -> bool:
        """Whether anything has drawn random numbers since: dropout, embedding noise."""
        return any(not torch.equal(a, b) for a, b in zip(self.state, self._now()))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        today = self._now()
        try:
            if self.enabled:
                self._put(self.state)
            yield
        finally:
            if self.enabled:
                self._put(today)


def _number(device: torch.device) -> tuple[torch.device, ...]:
    """Apple's GPU is one, and its functions take no device."""
    return () if device.type == "mps" else (device,)
