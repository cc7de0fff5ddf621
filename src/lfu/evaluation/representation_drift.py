"""How far fine-tuning moved a model's hidden states on the same tokens: cosine similarity and linear CKA."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity

from lfu.evaluation.hidden import Hidden
from lfu.evaluation.intervals import Interval, mean_interval


@dataclass(frozen=True)
class RepresentationDrift:
    """Similarity of two models' hidden states in layers 1..K, over N tokens of equal weight.

    `cosine` is the mean cosine similarity with its bootstrap interval over the texts; `cka` is linear CKA.
    """

    tokens: int
    layers: list[int]
    cosine: list[Interval]
    cka: list[float]


def representation_drift(base: Hidden, tuned: Hidden, *, seed: int = 0) -> RepresentationDrift:
    """Compares hidden states that `hidden_states` read on the same pieces, in float64, layer by layer.

    Raises ValueError: other tokens, layers or widths; fewer than two tokens.
    """
    if base.counts != tuned.counts:
        raise ValueError("the hidden states of the two models were not read at the same tokens")
    if list(base.layers) != list(tuned.layers):
        raise ValueError(f"the models have {len(base.layers)} and {len(tuned.layers)} layers: nothing to compare")
    cosine, cka = [], []
    for layer, x in base.layers.items():
        y = tuned.layers[layer]
        if x.shape != y.shape:
            raise ValueError(f"the models are {x.shape[1]} and {y.shape[1]} wide: nothing to compare")
        cosine.append(mean_cosine(x, y, base.counts, seed=seed))
        cka.append(linear_cka(x, y))
    return RepresentationDrift(sum(base.counts), list(base.layers), cosine, cka)


def mean_cosine(x: Tensor, y: Tensor, counts: list[int], *, seed: int = 0) -> Interval:
    """Mean over the N rows of the cosine between x and y, both `(N, d)`; the interval draws whole texts.

    The rows are those of one text after the other; each has as many as `counts` says.
    """
    per_token = cosine_similarity(x.double(), y.double(), dim=1)
    per_text = [float(part.mean()) for part in per_token.split(counts)]
    return mean_interval(per_text, [float(count) for count in counts], seed=seed)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of x `(N, d)` and y `(N, e)`, 0 to 1, in float64.

    `||Y'X||^2 / (||X'X|| ||Y'Y||)`, Frobenius norms, columns centred over all N rows at once: the feature-space form
    of Kornblith et al. 2019 (arXiv 1905.00414), not the unbiased estimator over mini-batches. With N not well above d
    it is biased upwards. Unchanged by orthogonal transforms and by scaling of either.

    Raises ValueError: different N; fewer than two rows; rows that are all the same.
    """
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"CKA needs the same two or more tokens twice, got {len(x)} and {len(y)}")
    x, y = (z - z.mean(0) for z in (x.double(), y.double()))
    within = (_cross(x, x) * _cross(y, y)) ** 0.5
    if not within:
        raise ValueError("CKA is undefined: all tokens have the same hidden state")
    return _cross(x, y) / within


def _cross(x: Tensor, y: Tensor) -> float:
    """||Y'X||_F^2 by whichever is smaller: the features' products or the tokens'."""
    if len(x) < max(x.shape[1], y.shape[1]):
        return float(((x @ x.T) * (y @ y.T)).sum())
    return float((y.T @ x).square().sum())
