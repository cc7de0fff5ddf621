"""A comparison's pictures, on records that were made up."""

from __future__ import annotations

from made_up import made_results, several

from lfu.report import compare_figures as figures
from lfu.report.compare_mode import Mode


def test_training_losses_over_something_else_are_set_apart():
    """IM's is over the prompt, SDFT's over answers of its own, replay's over other rows: no token loss is replaced."""
    from lfu.methods import method_class

    methods = ["sft", "gem", "kl", "im", "sdft", "replay"]
    results = made_results({"steps": {method: several(1.0) for method in methods}})
    for method in methods:
        results["settings"][method]["places"] = method_class(method).places
    assert set(figures.own_losses(results, methods)) == {"gem", "im", "sdft", "replay"}
    picture = figures.curves(Mode(results, "steps"))
    assert "im: over the prompt, too; sdft: over answers that the model rewrote" in picture.caption


def test_no_two_settings_look_alike():
    from lfu.report.figures import MARKERS, PALETTE, look

    labels = [f"method {number}" for number in range(40)]
    looks = look(["untouched", *labels])
    assert len({looks[label]["color"] for label in labels[:11]} | {looks["untouched"]["color"]}) == 12
    assert len({(looks[label]["color"], looks[label]["ls"]) for label in labels}) == 40
    colours, markers = len(PALETTE) - 1, len(MARKERS)
    assert len(set(MARKERS)) == markers
    assert len({(number % colours, number % markers) for number in range(100)}) == 100  # in a scatter


def test_what_was_forgotten_on_the_way_is_a_mean_over_the_seeds():
    """At the steps that all of them have: a seed may have been measured more often, as its time allowed."""
    reading = lambda step, lost, rise: {"step": step, "net_lost": lost, "prose_rise": rise}
    seeds = {
        0: [reading(4, 0.1, 0.5), reading(6, 0.9, 9.0), reading(8, 0.2, 1.0)],
        1: [reading(4, 0.1, 0.0), reading(8, 0.0, 0.5)],
    }
    mode = {"forgetting": {"sft": seeds, "gem": {0: []}}}  # GEM was trained before it was asked for
    of = lambda found: Mode({"settings": {"sft": {}, "gem": {}}, "metrics": {}, "modes": {"steps": found}}, "steps")
    picture = figures.forgetting(of(mode))
    assert picture is not None
    assert picture.alt == "at the last step: sft: +10.0 % of known answers lost, prose +0.750 nats"
    assert figures.forgetting(of({"forgetting": {"gem": {0: []}}})) is None
