"""A comparison's pictures, on records that were made up."""

from __future__ import annotations

from made_up import made_results, several

from lfu.report import compare_figures as figures


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
