"""How steady are a model's representations when its input is noisy? Noise of NEFTune's strength on the embeddings."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from lfu.evaluation.batching import Progress, tick
from lfu.evaluation.hidden import Batch, over_batches, parts_of
from lfu.evaluation.intervals import Interval, mean_interval, paired_difference
from lfu.evaluation.pieces import Render, answer_pieces, longest_input
from lfu.evaluation.score import TokenScores
from lfu.model.rng import generators
from lfu.support.annotations import Model, Tokenizer

_DRAWS_APART = 2**24  # sequences that may be numbered within one draw


@dataclass(frozen=True)
class NoiseScores:
    """What noisy input does to a model, per row, so that two models can be compared in pairs.

    The cosine similarity is that of clean and noisy hidden states at the positions that predict the row's answer, mean
    over them and over the draws.
    """

    layers: list[int]  # 1..K; K is after the final norm
    cosine: list[list[float]]  # per layer, one number per row
    clean: list[float]  # summed NLL of each row's answer (nats)
    noisy: list[float]  # the same with noise, mean over the draws
    tokens: list[int]  # of each row's answer

    def by_layer(self, *, seed: int = 0) -> list[Interval]:
        """Mean cosine of each layer, every token of equal weight, with its bootstrap interval over the rows."""
        return [mean_interval(values, self._weights, seed=seed) for values in self.cosine]

    def overall(self, *, seed: int = 0) -> Interval:
        """Mean cosine over all layers and tokens."""
        return mean_interval(self._row_means, self._weights, seed=seed)

    def nll_rise(self, *, seed: int = 0) -> Interval:
        """How much the noise raises the answer's NLL (nats per token), row by row."""
        noisy, clean = (TokenScores(sums, self.tokens).each for sums in (self.noisy, self.clean))
        return paired_difference(noisy, clean, self._weights, seed=seed)

    def against(self, other: Self, *, seed: int = 0) -> Interval:
        """Mean cosine over all layers minus the other model's, on the same rows.

        Raises ValueError: other rows, or rows cut into other tokens.
        """
        if self.tokens != other.tokens:
            raise ValueError("the two models were not read at the same tokens: their similarities can't be compared")
        return paired_difference(self._row_means, other._row_means, self._weights, seed=seed)

    @property
    def _weights(self) -> list[float]:
        return [float(count) for count in self.tokens]

    @property
    def _row_means(self) -> list[float]:
        return [sum(values) / len(values) for values in zip(*self.cosine)]


def noise_similarity(
    model: Model, tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]], *, alpha: float = 5.0, draws: int = 4,
    seed: int = 0, batch_size: int = 8, render: Render | None = None, progress: Progress | None = None,
) -> NoiseScores:  # fmt: skip
    """Clean against noisy hidden states, layer by layer, at the positions that predict answer tokens (paper, Figure 6).

    Noise is added to the embedding of every token: uniform on (-1, 1) times `alpha / sqrt(L d)`, with L the tokens of
    the sequence, padding left out, and d the embedding's width (NEFTune, Jain et al. 2023, arXiv 2310.05914). It
    depends on seed, draw and row alone: models of one width and tokenizer get the very same noise.

    Rows and `render` are those of `lfu.evaluation.score.answer_nll`. `alpha` is NEFTune's noise scale, >= 0 (its paper
    trains with 5 to 15); noise is drawn for each row `draws` times.

    Raises ValueError: alpha or draws out of range; no rows, or a row longer than the model reads; prompt tuning.
    """
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"the noise scale alpha must be a finite number, 0 or more, got {alpha!r}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws!r}")
    pieces = answer_pieces(tokenizer, rows, render=render, window=longest_input(model, most=2**20))
    parts = parts_of(model)
    counts = [piece.tokens for piece in pieces]
    layers = list(range(1, len(parts.blocks) + 1))
    cosine = torch.zeros(len(layers), len(pieces), dtype=torch.float64)
    clean, noisy = torch.zeros(2, len(pieces), dtype=torch.float64)

    def compare(batch: Batch) -> None:
        at, sizes = batch.indices, [counts[i] for i in batch.indices]
        still = batch.read()
        clean[at] = _nll(parts, batch, still[layers[-1]], sizes)
        lengths = [len(pieces[i].ids) for i in at]
        for draw in range(draws):
            sources = [draw * _DRAWS_APART + i for i in at]
            with _noisy(parts.model.get_input_embeddings(), lengths, sources, alpha, seed):
                moved = batch.read()
            for layer, before in still.items():
                similar = cosine_similarity(before.double(), moved[layer].double(), dim=1).split(sizes)
                cosine[layer - 1, at] += torch.stack([values.mean() for values in similar]) / draws
            noisy[at] += _nll(parts, batch, moved[layers[-1]], sizes) / draws
        tick(progress, len(at))

    over_batches(model, tokenizer, pieces, batch_size, compare)
    return NoiseScores(layers, cosine.tolist(), clean.tolist(), noisy.tolist(), counts)


def _nll(parts: Any, batch: Batch, hidden: Tensor, sizes: list[int]) -> Tensor:
    """NLL of each row's answer from the last layer, which is after the final norm: only the head is missing."""
    logits = parts.logits(hidden.to(parts.device, parts.model.dtype)).float()
    each = cross_entropy(logits, batch.targets, reduction="none")
    return torch.stack([part.sum() for part in each.split(sizes)]).double().cpu()


def _noisy(
    embedding: nn.Module, lengths: Sequence[int], sources: Sequence[int], alpha: float, seed: int
) -> AbstractContextManager[Any]:
    """Inside, what the embedding gives is noisy, as NEFTune has it in training; of each row only its tokens are.

    Each row has a random generator of its own (`sources`), so that the noise is the same at every batch size.
    """

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # (B, T, d)
        width = output.shape[-1]
        noise = torch.zeros(output.shape)
        for row, (length, source) in enumerate(zip(lengths, sources)):
            generator = generators(seed, source)(torch.device("cpu"))  # and the same on every device
            uniform = torch.rand(length, width, generator=generator) * 2 - 1
            noise[row, :length] = uniform * alpha / (length * width) ** 0.5
        return output + noise.to(output.device, output.dtype)

    return embedding.register_forward_hook(add)
