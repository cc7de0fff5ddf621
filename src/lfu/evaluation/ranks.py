"""The paper's rank of a method: the mean of its ranks by category (arXiv 2511.13052, Table 1)."""

from collections.abc import Mapping


def category_ranks(scores: Mapping[str, float], *, decimals: int | None = 1) -> dict[str, float]:
    """name -> rank among the names in one category: 1 is the highest score, equal ones share the best of their places.

    Higher scores are better. They are equal if they are so after rounding to `decimals` places (the paper ranks the per
    cents that it prints, with one place); None: only if exactly equal.
    """
    shown = {name: score if decimals is None else round(score, decimals) for name, score in scores.items()}
    return {name: 1.0 + sum(other > score for other in shown.values()) for name, score in shown.items()}


def average_ranks(categories: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """name -> mean of its ranks over the categories.

    Reproduces the rank column of the paper's Table 1 from its four category averages as printed, over the six rows that
    have a rank. Sharing the mean of the places does not, nor does LfU (RepS) as a seventh row.

    Args:
        categories: category -> name -> score, higher is better; the same names in each.

    Raises ValueError: no category, one without names, or other names in one than in another.
    """
    if not categories or not all(categories.values()):
        raise ValueError("nothing to rank")
    if len({frozenset(scores) for scores in categories.values()}) > 1:
        raise ValueError("a rank over categories needs the same names in each category")
    ranks = [category_ranks(scores) for scores in categories.values()]
    return {name: sum(rank[name] for rank in ranks) / len(ranks) for name in ranks[0]}
