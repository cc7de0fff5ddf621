"""Which training row a token belongs to, and how well the model does on each row before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset

from lfu.evaluation.batching import evaluating
from lfu.methods.token_loss import nll_of
from lfu.model.representations import Reader, answer_positions


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


def nll_before_training(trainer: Any, method: str) -> list[torch.Tensor]:
    """The loss of each token of each training row under the model as it is: `(T,)` each, on the CPU; nan: no label.

    One forward over the training rows, shared between the processes; rows may be packed.

    Raises:
        ValueError: the rows are a stream, and can't be read twice.
    """
    rows = trainer.train_dataset
    if not isinstance(rows, Dataset):
        raise ValueError(f"method {method!r} reads all training rows first: give a datasets.Dataset, not a stream")
    model, accelerator = trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator
    mine = range(accelerator.process_index, len(rows), accelerator.num_processes)
    size = trainer.args.per_device_train_batch_size
    found: list[tuple[int, torch.Tensor]] = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(mine), size):
            numbers = list(mine[start : start + size])
            found += zip(numbers, _nll_of_rows(trainer, [rows[number] for number in numbers]))
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        told = gather_object([(number, nll.tolist()) for number, nll in found])
        found = [(number, torch.tensor(nll)) for number, nll in told]
    return [nll for _, nll in sorted(found, key=lambda pair: pair[0])]


def _nll_of_rows(trainer: Any, rows: list[dict[str, Any]]) -> list[torch.Tensor]:
    anatomy = trainer.anatomy
    known = trainer._signature_columns or ("input_ids", "labels", "seq_lengths")
    batch = trainer.data_collator([{k: v for k, v in row.items() if k in known} for row in rows])
    batch = {k: v.to(anatomy.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    labels, positions = batch["labels"], answer_positions(batch["labels"])
    nll = torch.full(labels.shape, torch.nan).flatten()
    if len(positions):
        reader = Reader(anatomy, [len(anatomy.blocks)])
        with trainer.compute_loss_context_manager(), reader.reading(positions, detach=True, stop=True) as hidden:
            reader.run(batch)
            (last,) = hidden.values()
            targets = labels.flatten()[positions + 1]
            pairs = zip(last.split(256), targets.split(256))
            nll[positions.cpu() + 1] = torch.cat([nll_of(anatomy.logits(h), y) for h, y in pairs]).to(nll)
    lengths = [len(row["input_ids"]) for row in rows]
    if len(labels) == len(rows):
        return [line[:length] for line, length in zip(nll.view(labels.shape), lengths)]
    return list(nll[: sum(lengths)].split(lengths))  # padding-free: one row after the other
