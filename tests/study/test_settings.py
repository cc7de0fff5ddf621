"""What a setting's text means, and which plain SFT run each is measured against."""

from __future__ import annotations

import pytest

from lfu.study.settings import Setting, grid, make_setting, parse_setting, with_yardsticks
from lfu.support.errors import UserError


@pytest.mark.parametrize(
    ("text", "setting", "label"),
    [
        ("sft", Setting("sft"), "sft"),
        (
            "lfu:alpha=0.01:lam=auto",
            Setting("lfu", own=(("alpha", "0.01"), ("lam", "auto"))),
            "lfu alpha=0.01 lam=auto",
        ),
        ("gem:beta=0.5", Setting("gem", knobs=(("gem.beta", "0.5"),)), "gem beta=0.5"),
        ("gem:gem.beta=0.5", Setting("gem", knobs=(("gem.beta", "0.5"),)), "gem beta=0.5"),
        # alpha is LfU's where LfU is, and NEFTune's where it isn't
        ("neftune:alpha=10", Setting("neftune", knobs=(("neftune.alpha", "10"),)), "neftune alpha=10"),
        ("lfu+neftune:alpha=0.5", Setting("lfu+neftune", own=(("alpha", "0.5"),)), "lfu+neftune alpha=0.5"),
        (
            "lfu+neftune:neftune.alpha=10",
            Setting("lfu+neftune", knobs=(("neftune.alpha", "10"),)),
            "lfu+neftune neftune.alpha=10",
        ),
        # not LfU's alone: KL, L1 and others look into the blocks as well
        ("kl:blocks=layers", Setting("kl", shared=(("blocks", "layers"),)), "kl blocks=layers"),
        ("sft:learning_rate=1e-3", Setting("sft", shared=(("learning_rate", "1e-3"),)), "sft learning_rate=1e-3"),
        # a colon in a value is no new entry
        (
            "replay:data=word_problems:30:share=0.2",
            Setting("replay", knobs=(("replay.data", "word_problems:30"), ("replay.share", "0.2"))),
            "replay data=word_problems:30 share=0.2",
        ),
    ],
)
def test_a_settings_text(text, setting, label):
    assert parse_setting(text) == setting
    assert parse_setting(text).label == label


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gme", "Did you mean gem?"),
        ("lfu:alhpa=1", "Did you mean alpha?"),
        ("gem:alpha=1", "LfU's own"),
        ("gem:beta=7", "gem.beta must be"),
        ("gem+dft", "can't be combined"),
        ("sft:seed=3", "set by the study itself"),
        ("sft:output_dir=x", "set by the study itself"),
        ("neftune+gem:gme.beta=1", "unknown name"),
        ("", "unknown method"),
    ],
)
def test_wrong_settings_are_the_users(text, says):
    with pytest.raises(UserError, match=says):
        parse_setting(text)


def test_a_grid_has_every_combination_once():
    settings = grid("lfu", {"alpha": ["0.1", "1"], "lam": ["1", "5", "9"]})
    assert [tuple(s.values.values()) for s in settings] == [(a, b) for a in ("0.1", "1") for b in ("1", "5", "9")]


def test_plain_sft_is_added_and_comes_first():
    for given in (["gem", "lfu"], ["gem", "sft", "lfu"], ["gem", "lfu", "sft"]):
        assert [s.label for s in with_yardsticks(map(parse_setting, given))] == ["sft", "gem", "lfu"]


def test_training_flags_have_a_yardstick_of_their_own():
    settings = with_yardsticks(grid("lfu", {"alpha": ["1", "2"], "data_limit": ["8", "16"]}))
    added = settings[:2]
    assert [s.label for s in added] == ["sft data_limit=8", "sft data_limit=16"]
    assert len(settings) == 6
    assert make_setting("lfu", {"data_limit": "8", "alpha": "1"}).yardstick == added[0]
    assert added[0].yardstick == added[0]
