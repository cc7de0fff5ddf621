"""What a study recommends, on records that were made up: what is compared with what, and what is chosen."""

from __future__ import annotations

from made_up import made_record, made_results, made_setting, made_view, said, several, tables

from lfu.study.choose import compared_with, held_against
from lfu.study.settings import Setting

TO_SFT = "Difference to plain SFT [95 % interval]"
TO_UNTOUCHED = "Difference to the untouched model [95 % interval]"


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
        "Recommended: plain SFT at learning rate 1. Nothing else that was tried had a lower loss on the validation "
        "rows without forgetting more."
    )
    assert said(results)[1] == "On the items used for choosing, every other setting forgets more than is allowed."
    assert [row[0] for row in tables(results)[TO_SFT].rows] == ["sft learning_rate=1e-3"]
    assert [row[0] for row in tables(results)[TO_UNTOUCHED].rows] == ["sft"]


def test_a_method_with_a_training_flag_that_forgets_more_than_plain_sft_is_not_recommended_either():
    flag = ":learning_rate=1e-3"
    found = {"sft": several(1.0), f"sft{flag}": several(0.6, right=2), f"gem{flag}": several(0.5, right=2)}
    assert made_results({"steps": found})["recommended"]["label"] == "sft"


def test_plain_sft_that_forgets_no_more_is_recommended_against_the_one_without_flags():
    results = made_results({"steps": {"sft": several(1.0), "sft:learning_rate=1e-3": several(0.5)}})
    told = (
        "Recommended: sft learning_rate=1e-3 at learning rate 1. Compared with plain SFT on held-out items "
        "(2 comparisons), it is ahead on the target (held-out loss -0.500 ["
    )
    assert said(results)[0].startswith(told)


def test_a_sweep_of_a_flag_over_plain_sft_is_held_against_the_untouched_model():
    found = {f"sft:learning_rate={rate}": several(loss, right) for rate, loss, right in [
        ("1e-4", 1.5, 20), ("1e-3", 1.0, 20), ("1e-2", 0.5, 2),
    ]}  # fmt: skip
    results = made_results({"steps": found})
    assert results["recommended"]["label"] == "sft learning_rate=1e-3"
    assert results["recommended"]["excluded"] == ["sft learning_rate=1e-2"]
    assert TO_SFT not in tables(results)
    assert [row[0] for row in tables(results)[TO_UNTOUCHED].rows] == list(results["settings"])
    picture = next(block for block in made_view(results).blocks if getattr(block, "name", "") == "sweep-steps")
    assert "sft learning_rate=1e-2 0.502" in picture.alt
    assert "Dashed" not in picture.caption


def test_nothing_is_recommended_where_everything_forgets():
    results = made_results({"steps": {"sft:learning_rate=1": several(1.0, right=2)}})
    assert results["recommended"] is None
    assert said(results)[0].startswith("No setting is recommended")


def test_a_setting_of_which_a_run_failed_is_shown_with_its_seeds_and_neither_ranked_nor_chosen():
    """Its two easy seeds look best of all."""
    gem = [None, *several(0.5, seeds=2)]
    results = made_results({"steps": {"sft": several(1.0), "gem": gem, "dft": several(0.9)}})
    table = tables(results)["Results, mean ± standard deviation over 3 seeds where no other number is given"]
    assert [row[0] for row in table.rows] == ["untouched", "sft", "gem (2 seeds)", "dft"]
    assert [row[1] for row in table.rows] == ["-", "1.5", "-", "1.0"]
    assert table.note.endswith("Not ranked, and not recommended: gem, as a run failed.")
    assert results["recommended"]["candidate"] == "dft"
    assert [row[0] for row in tables(results)[TO_SFT].rows] == ["gem (2 seeds)", "dft"]


def test_an_unfinished_study_ranks_and_chooses_over_the_seeds_that_all_have():
    """DFT's third seed would have put it behind SFT."""
    dft = [*several(0.99, seeds=2), made_record(2.0, seed=2)]
    results = made_results({"steps": {"sft": several(1.0, seeds=2), "dft": dft}})
    table = next(table for caption, table in tables(results).items() if caption.startswith("Results"))
    assert [row[1] for row in table.rows] == ["-", "1.5", "1.0"]
    assert table.note.endswith("Ranked over the seeds that all have finished (0, 1).")
    assert results["recommended"]["candidate"] == "dft"
    assert results["recommended"]["seeds"] == 2


def test_nothing_is_recommended_where_a_run_of_everything_failed():
    results = made_results({"steps": {"sft": [None, *several(1.0, seeds=2)]}})
    assert results["recommended"] is None
    assert said(results)[0] == "No setting is recommended: a run of every setting failed."
