"""What a comparison found, in sentences: what is recommended, how sure that is, and what plain SFT forgot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lfu.report.compare_text import change
from lfu.report.text import and_, sign
from lfu.study.kinds import turn

WORDS = {1: "better", -1: "worse", 0: ""}


def verdict(record: Mapping[str, Any]) -> list[str]:
    """What was found, in sentences."""
    results = record["results"]
    sentences = []
    if not results["whole"]:
        states = [run["state"] for run in results["runs"]]
        sentences.append(
            f"Not finished: {states.count('finished')} of {len(states)} known runs are. What follows is preliminary."
        )
    sentences += _recommendation(results)
    sentences += _yardsticks(results)
    if results["collapse"]:
        sentences.append(_collapse_sentence(results["collapse"]))
    failed = [run for run in results["runs"] if run["state"] == "failed"]
    if failed:
        names = and_(list(dict.fromkeys(run["label"] for run in failed)))
        sentences.append(f"{len(failed)} of {len(results['runs'])} runs failed ({names}): see Runs.")
    if not results["metrics"]:
        untouched = next((run for run in results["runs"] if run["label"] == "untouched"), None)
        if untouched and untouched["state"] == "failed":
            sentences.append(f"The untouched model could not be measured: {untouched['error']}.")
        elif results["whole"]:
            sentences.append("Only time and memory were measured.")
    return sentences or ["Nothing is finished yet."]


def _recommendation(results: Mapping[str, Any]) -> list[str]:
    """The recommended setting, and how sure that is."""
    found = results["recommended"]
    if not results["metrics"]:
        return []
    if found is None:
        losses = [one["loss"] for one in results["validation"].get("settings", {}).values()]
        why = (
            "judged by the choosing items, each of them forgets more than allowed"
            if any(losses)
            else "a run of every setting failed"
        )
        return [f"No setting is recommended: {why}."] if losses and results["whole"] else []
    yardstick = _sft(found["yardstick"])
    if found["candidate"] == found["yardstick"]:
        why = "nothing that was tried had a lower loss on the validation rows"
        why += " without forgetting more." if found["excluded"] else "."
        return [f"Recommended: {yardstick}, learning rate {found['learning_rate']}: {why}", *_how_sure(results)]
    against = results["modes"][found["mode"]]["against_sft"]
    better = and_([_told(results, key, found["sure"][key]) for key in found["better"]])
    worse = and_([_told(results, key, against[key][found["candidate"]]) for key in found["worse"]])
    named = f"{found['candidate']}, learning rate {found['learning_rate']}"
    rest = f"; no difference beyond the noise in {and_(_titles(results, found['same']))}" if found["same"] else ""
    if found["better"] and not found["worse"]:
        sentence = f"Recommended: {named}: against {yardstick} it is better in {better}{rest}."
    elif found["better"]:
        sentence = (
            f"A trade: {named} is better than {yardstick} in {better}, and worse in {worse}{rest}. Take it if the "
            "former matters more."
        )
    elif found["worse"]:
        sentence = (
            f"Recommended: {yardstick}, the plainest: {named} had the lowest loss on the validation rows, but on the "
            f"test rows it is worse in {worse} and better in nothing."
        )
    else:
        sentence = (
            f"Recommended: {yardstick}, the plainest: {named} had the lowest loss on the validation rows, but on the "
            "test rows there is no difference beyond the noise."
        )
    return [sentence, *_how_sure(results), *_same_time(results)]


def _how_sure(results: Mapping[str, Any]) -> list[str]:
    """How far behind the runner-up was, and what the intervals know."""
    found, sentences = results["recommended"], []
    if second := found["runner_up"]:
        far = "" if sign(second) else ", which is within the noise"
        behind = change({"kind": "nll"}, second, unit=True)
        sentences.append(f"Next on the validation rows: {second['label']}, {behind} to {found['candidate']}{far}.")
    elif sum(one["loss"] is not None for one in results["validation"]["settings"].values()) > 1:
        sentences.append("Judged by the choosing items, every other setting forgets more than allowed.")
    if found["seeds"] == 1:
        sentences.append(
            "One seed: the intervals cover the noise of the items only; another seed could change the order."
        )
    else:
        few = " A few seeds give only a rough idea of their spread." if found["seeds"] < 5 else ""
        sentences.append(f"Intervals: 95 %, paired over {found['seeds']} seeds and the items.{few}")
    if len(found["sure"]) > 1:
        level = next(iter(found["sure"].values()))["level"]
        sentences[-1] += (
            f" Better is what lies beyond {100 * level:.1f} %, so that all {len(found['sure'])} columns together call "
            "something better by chance in 5 % of studies (Bonferroni); worse, beyond 95 %."
        )
    return sentences


def _same_time(results: Mapping[str, Any]) -> list[str]:
    """The recommended setting in the time that plain SFT took."""
    label = results["recommended"]["candidate"]
    time = results["modes"].get("time") if len(results["modes"]) > 1 else None
    if time is None or not any(label in each for each in time["against_sft"].values()):
        return []
    told = {key: each[label] for key, each in time["against_sft"].items() if label in each}
    by_turn = {way: [key for key, i in told.items() if turn(results["metrics"][key], i) == way] for way in (1, -1)}
    parts = [f"{WORDS[way]} in {and_(_titles(results, keys))}" for way, keys in by_turn.items() if keys]
    return [f"In plain SFT's time, {label} is {' and '.join(parts) or 'no different beyond the noise'}."]


def _yardsticks(results: Mapping[str, Any]) -> list[str]:
    """Was there anything to save? What plain SFT learned and forgot against the untouched model."""
    mode = next(iter(results["modes"].values()), None)
    if mode is None or not mode["against_untouched"]:
        return []
    sentences = []
    labels = [label for label, one in results["settings"].items() if one["yardstick"] == label]
    for label in labels:
        changes = {key: each[label] for key, each in mode["against_untouched"].items() if label in each}
        lost = [
            key for key, i in changes.items()
            if results["metrics"][key]["group"] == "kept" and turn(results["metrics"][key], i) < 0
        ]  # fmt: skip
        kept = [key for key in changes if results["metrics"][key]["group"] == "kept"]
        if not changes:
            continue
        learned = f"{_sft(label)[0].upper()}{_sft(label)[1:]} against the untouched model: " + (
            _told(results, "loss", changes["loss"]) if "loss" in changes else "not measured"
        )
        if lost:
            told = and_([_told(results, key, changes[key]) for key in lost])
            sentences.append(f"{learned}. It forgot: {told}.")
        elif kept:
            sentences.append(f"{learned}. It forgot nothing beyond the noise, so there was little to save.")
        else:
            sentences.append(f"{learned}.")
    return sentences[:3]


def _told(results: Mapping[str, Any], key: str, interval: Mapping[str, Any]) -> str:
    metric = results["metrics"][key]
    return f"{metric['title']} ({change(metric, interval, unit=True)})"


def _titles(results: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [results["metrics"][key]["title"] for key in keys]


def _sft(label: str) -> str:
    return "plain SFT" + label.removeprefix("sft")


def _collapse_sentence(found: Mapping[str, Any]) -> str:
    """Where the bracket is, and whether it is the method that collapses."""
    where = _bracket(found)
    if found["sft"] is None or found["untouched"] is None or found["sft"] <= found["untouched"]:
        return where
    return (
        f"{where} But plain SFT, at the same learning rate and steps, is above the untouched model, too "
        f"({found['sft']:.3f} against {found['untouched']:.3f} on the validation rows): it overfits itself."
    )


def _bracket(found: Mapping[str, Any]) -> str:
    name = f"{found['method']}'s {found['name']}"
    if found["holds"] is not None and found["collapses"] is not None:
        return f"Training collapses between {name} {found['holds']:g} (holds) and {found['collapses']:g} (collapses)."
    if found["collapses"] is not None:
        return f"Training already collapses at {name} {found['collapses']:g}, the lowest value that was tried."
    if found["holds"] is not None:
        return f"Training does not collapse up to {name} {found['holds']:g}, the highest value that was tried."
    return f"It could not be determined where training collapses with {name}."
