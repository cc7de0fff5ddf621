"""What a study says of its records, on records that were made up: what is compared with what, and what is chosen."""

from __future__ import annotations

from made_up import made_record, made_results, made_setting, several

from lfu.report import compare_figures as figures
from lfu.report.compare_view import _differences_tables, _values_table, alike, verdict
from lfu.study.choose import compared_with, held_against
from lfu.study.settings import Setting


def said(results) -> list[str]:
    return verdict({"results": results})


# --- what is compared with what -------------------------------------------------------------------------------------


def test_a_setting_is_held_against_plain_sft_with_and_without_its_flags():
    sft, fast, lfu = map(made_setting, ("sft", "sft:learning_rate=1e-3", "lfu:learning_rate=1e-3"))
    assert held_against(sft, [sft, fast]) == []
    assert held_against(fast, [sft, fast]) == [sft]
    assert held_against(fast, [fast]) == [None]
    assert held_against(lfu, [sft, fast, lfu]) == [fast, sft]
    assert held_against(Setting("gem"), [sft]) == [sft]
    assert compared_with(lfu, [sft, fast, lfu]) == fast
    assert compared_with(sft, [sft]) is None


def test_plain_sft_that_forgets_more_is_not_recommended():
    """The faster one has the lowest loss, and has lost most of the questions."""
    found = {"sft": several(1.0), "sft:learning_rate=1e-3": several(0.5, right=2)}
    results = made_results({"steps": found})
    assert results["recommended"]["label"] == "sft"
    assert results["recommended"]["excluded"] == ["sft learning_rate=1e-3"]
    assert said(results)[0] == (
        "Recommended: plain SFT, learning rate 1: nothing that was tried had a lower loss on the validation rows "
        "without forgetting more."
    )
    assert said(results)[1] == "By the items that choose, every other setting forgets more than it may."
    tables = {table.caption: table for table in _differences_tables(results, results["modes"]["steps"])}
    assert [row[0] for row in tables["Difference to plain SFT [95 % interval]"].rows] == ["sft learning_rate=1e-3"]
    assert [row[0] for row in tables["Difference to the untouched model [95 % interval]"].rows] == ["sft"]


def test_a_method_with_a_training_flag_that_forgets_more_than_plain_sft_is_not_recommended_either():
    flag = ":learning_rate=1e-3"
    found = {"sft": several(1.0), f"sft{flag}": several(0.6, right=2), f"gem{flag}": several(0.5, right=2)}
    assert made_results({"steps": found})["recommended"]["label"] == "sft"


def test_plain_sft_that_forgets_no_more_is_recommended_against_the_one_without_flags():
    results = made_results({"steps": {"sft": several(1.0), "sft:learning_rate=1e-3": several(0.5)}})
    told = (
        "Recommended: sft learning_rate=1e-3, learning rate 1: against plain SFT it is better in held-out loss (-0.500"
    )
    assert said(results)[0].startswith(told)


def test_a_sweep_of_a_flag_over_plain_sft_is_held_against_the_untouched_model():
    found = {f"sft:learning_rate={rate}": several(loss, right) for rate, loss, right in [
        ("1e-4", 1.5, 20), ("1e-3", 1.0, 20), ("1e-2", 0.5, 2),
    ]}  # fmt: skip
    results = made_results({"steps": found})
    mode = results["modes"]["steps"]
    assert results["recommended"]["label"] == "sft learning_rate=1e-3"
    assert results["recommended"]["excluded"] == ["sft learning_rate=1e-2"]
    (table,) = _differences_tables(results, mode)
    assert table.caption == "Difference to the untouched model [95 % interval]"
    assert [row[0] for row in table.rows] == list(results["settings"])
    picture = figures.sweep(results, mode, "sweep")
    assert picture is not None
    assert "sft learning_rate=1e-2 0.502" in picture.alt
    assert "Dashed" not in picture.caption


def test_nothing_is_recommended_where_everything_forgets():
    results = made_results({"steps": {"sft:learning_rate=1": several(1.0, right=2)}})
    assert results["recommended"] is None
    assert said(results)[0].startswith("No setting is recommended")


# --- the verdict ----------------------------------------------------------------------------------------------------


def forgetful(chosen_by: int, reported: int) -> dict:
    """Questions right: so many of the 10 that choose, and of the 20 that are reported."""
    right = [i // 3 < chosen_by if i % 3 == 0 else i * 2 // 3 < reported for i in range(30)]
    return {"kept": {"knowledge": {"kind": "choice", "correct": right}}}


def test_a_trade():
    gem = several(0.5, measures=forgetful(7, 2))
    results = made_results({"steps": {"sft": several(1.0, measures=forgetful(7, 14)), "gem": gem}})
    told = said(results)[0]
    assert told.startswith("A trade: gem, learning rate 1 is better than plain SFT in held-out loss (-0.500 [")
    assert "and worse in general knowledge (-60.0 [" in told
    assert told.endswith("Take it if the former matters more.")
    assert results["recommended"]["label"] == "gem"


def test_better_on_the_validation_rows_and_worse_on_the_test_rows():
    results = made_results({"steps": {"sft": several(1.0), "gem": several(1.2, validation=0.9)}})
    assert said(results)[0].startswith(
        "Recommended: plain SFT, the plainest: gem, learning rate 1 had the lowest loss on the validation rows, but on "
        "the test rows it is worse in held-out loss (+0.200 ["
    )
    assert said(results)[0].endswith("and better in nothing.")
    assert results["recommended"]["label"] == "sft"


def test_better_on_the_validation_rows_and_nothing_else():
    results = made_results({"steps": {"sft": several(1.0), "gem": several(1.0, validation=0.9)}})
    assert said(results)[0].endswith("but on the test rows there is no difference beyond the noise.")


def test_in_plain_sfts_time():
    """With as many steps better; with the steps that its time allows worse in loss, or no different."""
    for loss, told in [
        (1.3, "worse in held-out loss"), (1.0, "no different beyond the noise"), (0.9, "better in held-out loss"),
    ]:  # fmt: skip
        steps = {"sft": several(1.0), "gem": several(0.5, seconds=2.0)}
        results = made_results({"steps": steps, "time": {"sft": several(1.0), "gem": several(loss, seconds=2.0)}})
        assert f"In plain SFT's time, gem is {told}." in said(results)


def test_what_failed_and_what_is_unfinished_is_said():
    results = made_results({"steps": {"sft": several(1.0), "gem": [None, *several(0.5, seconds=2.0, seeds=2)]}})
    assert "1 of 1 runs failed (gem): see Runs." in said(results)
    assert said(results | {"whole": False})[0].startswith("Not finished: 0 of 1 known runs are.")


# --- unequal seeds --------------------------------------------------------------------------------------------------


def test_a_setting_of_which_a_run_failed_is_shown_with_its_seeds_and_neither_ranked_nor_chosen():
    """Its two easy seeds look best of all."""
    gem = [None, *several(0.5, seeds=2)]
    results = made_results({"steps": {"sft": several(1.0), "gem": gem, "dft": several(0.9)}})
    mode = results["modes"]["steps"]
    table = _values_table(results, mode)
    assert [row[0] for row in table.rows] == ["untouched", "sft", "gem (2 seeds)", "dft"]
    assert [row[1] for row in table.rows] == ["-", "1.5", "-", "1.0"]
    assert table.caption == "Results, mean ± standard deviation over 3 seeds where no other number is given"
    assert table.note.endswith("Not ranked, and not recommended: gem, as a run failed.")
    assert results["recommended"]["candidate"] == "dft"
    (difference, _) = _differences_tables(results, mode)
    assert [row[0] for row in difference.rows] == ["gem (2 seeds)", "dft"]


def test_an_unfinished_study_ranks_and_chooses_over_the_seeds_that_all_have():
    """DFT's third seed would have put it behind SFT."""
    dft = [*several(0.99, seeds=2), made_record(2.0, seed=2)]
    results = made_results({"steps": {"sft": several(1.0, seeds=2), "dft": dft}})
    table = _values_table(results, results["modes"]["steps"])
    assert [row[1] for row in table.rows] == ["-", "1.5", "1.0"]
    assert table.note.endswith("Ranked over the seeds that all have finished (0, 1).")
    assert results["recommended"]["candidate"] == "dft"
    assert results["recommended"]["seeds"] == 2


def test_nothing_is_recommended_where_a_run_of_everything_failed():
    results = made_results({"steps": {"sft": [None, *several(1.0, seeds=2)]}})
    assert results["recommended"] is None
    assert said(results)[0] == "No setting is recommended: of each a run failed."


# --- ranks ----------------------------------------------------------------------------------------------------------


def test_many_sets_to_keep_do_not_outvote_what_was_learned():
    """GEM learns more; SFT keeps three sets of texts better: two categories, one each."""
    texts = lambda nll: {"kept": {name: {"kind": "text", "nll": [nll] * 9, "tokens": [1] * 9} for name in "abc"}}
    found = {"sft": several(1.0, measures=texts(2.0)), "gem": several(0.5, measures=texts(3.0))}
    ranks = made_results({"steps": found}, made_record(2.0, measures=texts(2.0)))["modes"]["steps"]["ranks"]
    assert ranks["by_metric"]["kept:a"] == {"sft": 1.0, "gem": 2.0}
    assert ranks["by_category"] == {"learned": {"sft": 2.0, "gem": 1.0}, "kept language": {"sft": 1.0, "gem": 2.0}}
    assert ranks["average"] == {"sft": 1.5, "gem": 1.5}


# --- how sure -------------------------------------------------------------------------------------------------------


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


def test_the_next_best_is_told_with_its_distance():
    """Validation losses of 1.0 and 1.1 in each seed, the same rows: 0.1 without noise; a twin is within the noise."""
    results = made_results({"steps": {"sft": several(1.0), "gem": several(1.1)}})
    assert "Next on the validation rows: gem, +0.100 [+0.100, +0.100] nats a token to sft." in said(results)
    results = made_results({"steps": {"sft": several(1.0), "gem": several(1.0)}})
    assert any(s.endswith("to sft, which is within the noise.") for s in said(results))
    assert made_results({"steps": {"sft": several(1.0)}})["recommended"]["runner_up"] is None


def test_the_level_of_better_is_said():
    told = said(made_results({"steps": {"sft": several(1.0), "gem": several(0.5)}}))
    assert (
        "Intervals: 95 %, paired over 3 seeds and the items. Few seeds tell their spread only roughly. Better is what "
        "lies beyond 97.5 %, so that all 2 columns together call something better by chance in 5 % of studies "
        "(Bonferroni); worse, beyond 95 %."
    ) in told


# --- curves ---------------------------------------------------------------------------------------------------------


def test_training_losses_over_something_else_are_set_apart():
    """IM's is over the prompt, SDFT's over answers of its own, replay's over other rows: no token loss is replaced."""
    from lfu.methods import method_class

    methods = ["sft", "gem", "kl", "im", "sdft", "replay"]
    results = made_results({"steps": {method: several(1.0) for method in methods}})
    for method in methods:
        results["settings"][method]["places"] = method_class(method).places
    assert set(figures.own_losses(results, methods)) == {"gem", "im", "sdft", "replay"}
    picture = figures.curves(results, results["modes"]["steps"], "training")
    assert "im: over the prompt, too; sdft: over answers that the model rewrote" in picture.caption


def test_no_two_settings_look_alike():
    from lfu.report.probe_figures import MARKERS, PALETTE

    labels = [f"method {number}" for number in range(40)]
    looks = figures.looks({"settings": {label: {} for label in labels}})
    assert len({looks[label]["color"] for label in labels[:11]} | {looks["untouched"]["color"]}) == 12
    assert len({(looks[label]["color"], looks[label]["ls"]) for label in labels}) == 40
    colours, markers = len(PALETTE) - 1, len(MARKERS)
    assert len(set(MARKERS)) == markers
    assert len({(number % colours, number % markers) for number in range(100)}) == 100  # in a scatter


# --- what is alike --------------------------------------------------------------------------------------------------


def test_what_is_alike_is_said_and_nothing_else():
    results = made_results({"steps": {"sft": several(1.0), "gem": several(1.0)}})
    assert alike(results) == [
        "Alike for all: the same untouched model, the same 28 training rows in the same order for a seed, 4 rows a "
        "step, 3 steps each, the same learning rates tried (1), the optimizer adamw, a schedule that is linear, "
        "warm-up 0, the same seeds (0, 1, 2), and the same items of every examination."
    ]


def test_what_is_not_alike_is_said_with_who_has_what():
    """More rows are more steps; a learning rate of one's own is not searched; replay brings rows along."""
    results = made_results({"steps": {"sft": several(1.0), "sft:data_limit=14": several(1.0), "replay": several(1.0)}})
    few, replay = results["settings"]["sft data_limit=14"], results["settings"]["replay"]
    few["training"] |= {"training rows": "14", "learning rates tried": "3"}
    few["steps"] = {"steps": 2}
    replay["places"] = ["mixture"]
    told = alike(results)
    for clause in ("28 training rows", "steps each", "learning rates"):
        assert clause not in told[0]
    assert told[1] == (
        "Not alike: training rows: 28 (sft and replay), 14 (sft data_limit=14). steps: 3 (sft and replay), 2 (sft "
        "data_limit=14). learning rates tried: 1 (sft and replay), 3 (sft data_limit=14)."
    )
    assert told[2] == "Of the training rows, replay mixes other rows in."


def test_equal_time_is_what_is_alike_where_steps_are_not():
    results = made_results({"time": {"sft": several(1.0), "gem": several(1.0)}})
    assert "the time of plain SFT's run each, the same seeds" in alike(results)[0]
    assert "steps each" not in alike(results)[0]
