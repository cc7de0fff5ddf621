"""One process: nobody to agree with. What `LfUStep` asks of its processes, and what one process answers."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


class _Touch(torch.autograd.Function):
    """Zero, with a gradient of zeros for everything it is given (one number each in memory)."""

    @staticmethod
    def forward(ctx: Any, *theta: torch.Tensor) -> torch.Tensor:
        ctx.theta = [(p.shape, p.dtype, p.device) for p in theta]
        return torch.zeros((), device=theta[0].device)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return tuple(torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.theta)


def touch(theta: Sequence[torch.Tensor]) -> torch.Tensor:
    """A zero whose backward reaches every tensor of theta, on whatever devices, so that a reducer sees all of them."""
    return _Touch.apply(*theta)


class OneProcess:
    """Nobody to agree with: every question is answered by this process alone."""

    size = 1
    alone = True
    scope = "global"  # what the ascent looks at: all processes, or each (`local`) at its own part

    def unwrapped(self, model: nn.Module) -> nn.Module:
        """The model inside its wrapper."""
        return model

    def deferred(self) -> AbstractContextManager[None]:
        """Within it, backward passes leave the reduction of theta's gradient to a later one."""
        return nullcontext()

    def summed(self, numbers: Sequence[float]) -> list[float]:
        """The sum of each number over the processes, in float64."""
        return list(numbers)

    def finite(self, loss: torch.Tensor) -> bool:
        """Whether the losses of all processes are finite."""
        return self.summed([float(not torch.isfinite(loss))]) == [0.0]

    def anyone(self, goes_on: bool) -> bool:
        """Whether one of the processes goes on; then all must, those that would skip with weight 0."""
        return self.summed([float(goes_on)])[0] > 0

    def nothing(self, batch: Mapping[str, Any], theta: Sequence[nn.Parameter]) -> torch.Tensor:
        """A zero to go backward from in place of a loss that is not finite; theta may lie on several devices."""
        return touch(theta)

    def mean(self, count: float) -> float:
        """A count, averaged over the processes."""
        return self.summed([count])[0] / self.size

    def total(self, count: float) -> float:
        """A count, summed over the processes that the ascent looks at."""
        return self.summed([count])[0] if self.scope == "global" else count

    def check(self, own: bool, reads_logits: bool, stale: int) -> None:
        """Raises ValueError for what can't be done right here; the message names what can."""

    def direction(
        self, gradients: list[torch.Tensor | None], parameters: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """The ascent gradient: this process's, or the sum over all."""
        return gradients

    def taps(self, measured: Sequence[nn.Parameter], theta: Sequence[nn.Parameter], own: bool) -> Any:
        """Several processes: what tells the SFT backward's gradient from the consistency backward's."""
        raise NotImplementedError

    def through(self, batch: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        """`run`, a forward of parts of the model, with all that the wrapper does round a forward."""
        return run()

    def joined(self, loss: torch.Tensor, goes_on: bool) -> torch.Tensor:
        """The loss of the perturbed pass as backward should see it."""
        return loss

    def settle(self, batch: Mapping[str, Any], decoder: nn.Module, backward: Callable[[torch.Tensor], Any]) -> None:
        """At the end of a micro-batch: a reduction that was deferred and not made up for is made now."""

    def gathered(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of each process, in float64."""
        return [list(numbers)]
