"""What a comparison's report says in sentences, on records that were made up."""

from __future__ import annotations

from made_up import made_record, made_results, said, several


def forgetful(chosen_by: int, reported: int) -> dict:
    """Questions right: so many of the 10 that choose, and of the 20 that are reported."""
    right = [i // 3 < chosen_by if i % 3 == 0 else i * 2 // 3 < reported for i in range(30)]
    return {"kept": {"knowledge": {"kind": "choice", "correct": right}}}


def test_a_trade():
    gem = several(0.5, measures=forgetful(7, 2))
    results = made_results({"steps": {"sft": several(1.0, measures=forgetful(7, 14)), "gem": gem}})
    told = said(results)[0]
    assert told.startswith(
        "A trade-off: gem at learning rate 1. Compared with plain SFT on held-out items (2 comparisons), it is ahead "
        "on the target (held-out loss -0.500 ["
    )
    assert "; behind on other skills (general knowledge -60.0 [" in told
    assert told.endswith("Choose it if what it gains matters more to you than what it loses.")
    assert results["recommended"]["label"] == "gem"


def test_better_on_the_validation_rows_and_worse_on_the_test_rows():
    results = made_results({"steps": {"sft": several(1.0), "gem": several(1.2, validation=0.9)}})
    assert said(results)[0].startswith(
        "Recommended: plain SFT, the simplest method. gem at learning rate 1 had the lowest loss on the validation "
        "rows, but, compared with plain SFT on held-out items (2 comparisons), it is not ahead on anything. It is "
        "behind on the target (held-out loss +0.200 ["
    )
    assert said(results)[0].endswith("; not measurably different on other skills (general knowledge).")
    assert results["recommended"]["label"] == "sft"


def test_better_on_the_validation_rows_and_nothing_else():
    results = made_results({"steps": {"sft": several(1.0), "gem": several(1.0, validation=0.9)}})
    assert said(results)[0].endswith(
        "it is not ahead on anything. It is not measurably different on the target (held-out loss) and other skills "
        "(general knowledge)."
    )


def test_in_plain_sfts_time():
    """With as many steps better; with the steps that its time allows worse in loss, or no different."""
    for loss, told in [
        (1.3, "behind on the target (held-out loss +0.300 ["), (0.9, "ahead on the target (held-out loss -0.100 ["),
        (1.0, "not measurably different on the target (held-out loss) and other skills (general knowledge)."),
    ]:  # fmt: skip
        steps = {"sft": several(1.0), "gem": several(0.5, seconds=2.0)}
        results = made_results({"steps": steps, "time": {"sft": several(1.0), "gem": several(loss, seconds=2.0)}})
        assert any(
            sentence.startswith(f"Trained for as long as plain SFT took, gem is {told}") for sentence in said(results)
        )


def test_what_failed_and_what_is_unfinished_is_said():
    results = made_results({"steps": {"sft": several(1.0), "gem": [None, *several(0.5, seconds=2.0, seeds=2)]}})
    assert "1 of 1 runs failed (gem): see Runs." in said(results)
    assert said(results | {"whole": False})[0].startswith("Not finished: 0 of 1 known runs are.")


def test_better_in_one_of_many_columns_must_hold_beyond_what_many_columns_give_by_chance():
    """14 of the 18 reported texts better: beyond 97.5 %, as two columns ask for, and not 99.75 %, as twenty do."""

    def texts(nll: list[float], names: str) -> dict:
        return {
            "kept": {
                name: {"kind": "text", "nll": nll if name == "a" else [2.0] * 27, "tokens": [1] * 27} for name in names
            }
        }

    change = [-0.1 if i < 21 else 0.1 for i in range(27)]
    for names, recommended in (("a", "gem"), ("abcdefghijklmnopqrs", "sft")):
        base = texts([2.0] * 27, names)
        gem = several(0.9999, validation=0.9, measures=texts([2 + d for d in change], names))
        found = {"sft": several(1.0, measures=base), "gem": gem}
        results = made_results({"steps": found}, made_record(2.0, measures=base))
        assert results["recommended"]["candidate"] == "gem"
        assert results["recommended"]["label"] == recommended, names


def test_each_of_the_three_axes_is_told_of():
    """What plain SFT's rows teach, the same in other words, and what should be kept."""

    def asked(loss: float) -> dict:
        each = {"tokens": [1] * 30, "correct": None}
        return {"prompts": {name: each | {"nll": [loss + 0.01 * i] * 30} for i, name in enumerate("abc")}}

    found = {"sft": several(1.0, measures=asked(1.5)), "gem": several(0.5, measures=asked(1.2))}
    results = made_results({"steps": found}, made_record(2.0, measures=asked(2.0)))
    assert results["metrics"]["reworded"]["title"] == "reworded loss"
    assert results["recommended"]["better"] == ["loss", "reworded"]
    told = said(results)[0]
    assert told.startswith(
        "Recommended: gem at learning rate 1. Compared with plain SFT on held-out items (4 comparisons), it is "
    )
    assert "ahead on the target (held-out loss -0.500 [-0.500, -0.500] nats per token) and reworded prompts" in told
    assert "reworded prompts (reworded loss -0.300 [-0.300, -0.300] nats per token); not measurably" in told
    assert told.endswith("on reworded prompts (wording deviation) and other skills (general knowledge).")


def test_what_is_ahead_and_not_recommended_is_told_too():
    """DFT learns less than plain SFT and keeps more; of two settings and two metrics that are four comparisons."""
    gem, dft = several(1.1, measures=forgetful(7, 14)), several(1.3, measures=forgetful(7, 20))
    results = made_results({"steps": {"sft": several(1.0, measures=forgetful(7, 14)), "gem": gem, "dft": dft}})
    assert results["recommended"]["label"] == "sft"
    level = '"Ahead" here means that the 98.75 % interval excludes zero, as 4 comparisons require (Bonferroni).'
    (told,) = [sentence for sentence in said(results) if sentence.endswith(level)]
    assert told.startswith("Compared with plain SFT, dft is ahead on other skills (general knowledge +30.0 [")
    results = made_results({"steps": {"sft": several(1.0), "gem": several(1.1), "dft": several(1.3)}})
    assert f"No other setting is ahead of plain SFT on anything. {level}" in said(results)
    results = made_results({"steps": {"sft": several(1.0), "gem": several(1.1)}})
    assert not any("here means" in sentence for sentence in said(results))


def test_the_next_best_is_told_with_its_distance():
    """Validation losses of 1.0 and 1.1 in each seed, the same rows: 0.1 without noise; a twin is within the noise."""
    results = made_results({"steps": {"sft": several(1.0), "gem": several(1.1)}})
    assert "Second best on the validation rows: gem, +0.100 [+0.100, +0.100] nats per token above sft." in said(results)
    results = made_results({"steps": {"sft": several(1.0), "gem": several(1.0)}})
    assert any(s.endswith("above sft, which is within the noise.") for s in said(results))
    assert made_results({"steps": {"sft": several(1.0)}})["recommended"]["runner_up"] is None


def test_the_level_of_better_is_said():
    told = said(made_results({"steps": {"sft": several(1.0), "gem": several(0.5)}}))
    assert (
        "Intervals are 95 % intervals of paired differences, over 3 seeds and the items. So few seeds give only a "
        'rough idea of their spread. "Ahead" means that the 97.5 % interval excludes zero. With 2 comparisons, chance '
        'alone then puts something ahead in at most 5 % of studies (Bonferroni). "Behind" means that the 95 % interval '
        "excludes zero."
    ) in told
