"""Which training row a token belongs to, and how well the model does on each row before training."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset

from lfu.evaluation.batching import evaluating
from lfu.methods.run import Trainer
from lfu.methods.tokens import in_pieces, nll_of, read_last

IGNORED = -100  # a label that carries no loss


def example_of(inputs: Mapping[str, Any], positions: torch.Tensor) -> torch.Tensor:
    """The example of each flat position: `(N,)`, numbers that differ between examples; packed ones are kept apart."""
    if (places := inputs.get("position_ids")) is not None:
        return ((places == 0).flatten().cumsum(0) - 1)[positions.to(places.device)]
    return positions // inputs["input_ids"].shape[1]


def means_by(group: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The mean of `values` `(N,)` in each group that occurs, in ascending order of the group's number."""
    _, where = group.to(values.device).unique(return_inverse=True)
    total = values.new_zeros(int(where.max()) + 1).index_add_(0, where, values)
    return total / where.bincount()


def key_of(tokens: torch.Tensor) -> bytes:
    """What an example is known by: its tokens `(T,)`, without padding."""
    return tokens.to("cpu", torch.int32).numpy().tobytes()


def examples_of(inputs: Mapping[str, Any]) -> list[tuple[bytes, torch.Tensor]]:
    """`(key, flat positions of its tokens)` of each example of a batch; what is padding belongs to none."""
    ids = inputs["input_ids"].flatten()
    mask = inputs.get("attention_mask")
    there = torch.arange(len(ids), device=ids.device) if mask is None else mask.flatten().nonzero().squeeze(1)
    number = example_of(inputs, there)
    return [(key_of(ids[place]), place) for place in (there[number == one] for one in number.unique())]


def losses_before_training(trainer: Trainer, method: str) -> dict[bytes, torch.Tensor]:
    """The loss of each token of each example under the model as it is: key -> `(T,)`, on the CPU; NaN: not labelled.

    One forward over the training rows, shared between the processes; rows may be packed.

    Raises ValueError: the rows are a stream, and can't be read twice.
    """
    rows, accelerator = trainer.train_dataset, trainer.accelerator
    if not isinstance(rows, Dataset):
        raise ValueError(f"method {method!r} reads all training rows first: give a datasets.Dataset, not a stream")
    mine, size = range(accelerator.process_index, len(rows), accelerator.num_processes), trainer.args.train_batch_size
    loss_of = lambda hidden, labels: nll_of(trainer.anatomy.logits(hidden), labels)
    found: list[tuple[bytes, torch.Tensor]] = []
    with evaluating(accelerator.unwrap_model(trainer.model)), torch.no_grad(), trainer.compute_loss_context_manager():
        for start in range(0, len(mine), size):
            batch = trainer.batch_of([rows[number] for number in mine[start : start + size]])
            last, places = read_last(trainer.anatomy, batch, detach=True, stop=True)
            labels = batch["labels"].flatten()
            nll = torch.full(labels.shape, torch.nan)
            nll[places.cpu()] = in_pieces(loss_of, last, labels[places]).to(nll)
            found += [(key, nll[place.cpu()]) for key, place in examples_of(batch)]
    losses = {b"": torch.empty(0)}  # a row without tokens
    if accelerator.num_processes > 1:  # as plain numbers: a tensor's pickle hangs on the dtype that is the default
        told = gather_object([(key, nll.tolist()) for key, nll in found])
        found = [(key, torch.tensor(nll)) for key, nll in told]
    for key, nll in found:
        losses[key] = torch.where(nll.isnan(), losses.get(key, nll), nll)  # another row may have other labels
    return losses
