"""What a micro-batch is to a `Trainer`: its number in the run, and what the sums over its tokens are divided by."""

from typing import Any

import torch
from transformers import Trainer


class CountsMicroBatches(Trainer):
    """A `Trainer`'s own rules, told apart from its training step, for whoever takes the step in its place."""

    _micro = (-1, 0)  # (update, micro-batch in it)

    def next_micro_batch(self) -> int:
        """The number of the micro-batch that begins: from the trainer's state, so that a resumed run counts on."""
        update, micro = self._micro
        self._micro = (update, micro + 1) if update == self.state.global_step else (self.state.global_step, 0)
        return self._micro[0] * self.args.gradient_accumulation_steps + self._micro[1]

    @property
    def starts_update(self) -> bool:
        """Whether the current micro-batch is the first of its update."""
        return self._micro[1] == 0

    def items_of(self, tokens: int, num_items: Any) -> float:
        """What the trainer's gradient of a micro-batch of so many labelled tokens is divided by, in tokens.

        `num_items`: those of all micro-batches of the update; None where nobody counted them.
        """
        if (counted := self.counted(num_items)) is not None:
            return max(float(counted), 1.0) / self.averaged(counted)
        return max(tokens, 1.0) * self.current_gradient_accumulation_steps

    def counted(self, num_items: Any) -> Any:
        """`num_items` if the loss is a sum over tokens divided by it; None if it is a mean over the micro-batch.

        The second kind `Trainer` divides by the accumulation steps before the backward.
        """
        known = hasattr(Trainer, "loss_is_scaled_for_ga")  # Trainer reads it since transformers 5.20
        summed: bool | None = self.loss_is_scaled_for_ga if known else None
        if summed is None:
            summed = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        return num_items if summed else None

    def averaged(self, num_items: Any) -> int:
        """Over how many processes the gradients will be averaged whose tokens `num_items` counts."""
        together = num_items is not None and self.args.average_tokens_across_devices
        return self.accelerator.num_processes if together else 1

    def share_of_loss(self, record: Any, items: float, processes: int) -> torch.Tensor:
        """What a training step returns for a `Record`, which is of all `processes`: its part of the update's loss."""
        return torch.tensor(record.loss * record.tokens / (items * processes), device=self.args.device)

    def figures_of(self, record: Any, items: float, processes: int, layers: bool = False) -> dict[str, float]:
        """The figures of such a `Record`; of an update's micro-batches `sft_loss` is on average that of all tokens."""
        found: dict[str, float] = record.figures(layers)
        if "sft_loss" in found:
            share = record.tokens / (items * processes)
            found["sft_loss"] *= share * self.current_gradient_accumulation_steps
        return found
