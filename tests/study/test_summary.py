"""Ranks over categories, on records that were made up."""

from __future__ import annotations

from made_up import made_record, made_results, several


def test_many_sets_to_keep_do_not_outvote_what_was_learned():
    """GEM learns more; SFT keeps three sets of texts better: two categories, one each."""
    texts = lambda nll: {"kept": {name: {"kind": "text", "nll": [nll] * 9, "tokens": [1] * 9} for name in "abc"}}
    found = {"sft": several(1.0, measures=texts(2.0)), "gem": several(0.5, measures=texts(3.0))}
    ranks = made_results({"steps": found}, made_record(2.0, measures=texts(2.0)))["modes"]["steps"]["ranks"]
    assert ranks["by_metric"]["kept:a"] == {"sft": 1.0, "gem": 2.0}
    assert ranks["by_category"] == {"learned": {"sft": 2.0, "gem": 1.0}, "kept language": {"sft": 1.0, "gem": 2.0}}
    assert ranks["average"] == {"sft": 1.5, "gem": 1.5}
