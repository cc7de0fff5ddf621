"""Results as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from stepcost.cases import AXES, Case
from stepcost.curves import curve, is_number
from stepcost.profiling import ELEMENTWISE, GROUPS, OTHER

TITLES = {
    "sft": "SFT, F+B",
    "trainer": "SFTTrainer's training_step",
    "oracle": "naive step (oracle), 3F+3B",
    "decoder": "decoder alone, padded",
    "decoder_unpadded": "decoder alone, unpadded",
    "lora": "LfU, LoRA",
    "steering": "LfU, steering",
    "own": "LfU, own",
    "sam": "SAM",
}
PLAIN_PASSES = ("decoder", "decoder_unpadded")


def markdown(result: dict[str, Any]) -> str:
    """All tables of a result, each under its heading."""
    parts = [_about(result)]
    if result.get("floors"):
        parts += ["### The floor, counted", floor_table(result["floors"])]
    for one in result["cases"]:
        fewer = f", {one['rounds']} rounds" if one.get("rounds", result["rounds"]) != result["rounds"] else ""
        parts += [f"### {Case(**one['case'])}{fewer}", case_table(one) if "seconds" in one else "", _failures(one)]
    for axis in AXES:
        if found := curve(result, axis):
            parts += [f"### Along {axis}", *(_shared(found)), curve_table(found, axis)]
    for one in result.get("profiles", []):
        parts += [f"### Profile: {one['case']}", causes_table(one["causes"]) if one["causes"] else ""]
        parts.append(operations_table(one) if "operations" in one else "")
    if result.get("stopped"):
        parts.append(f"Stopped: {result['stopped']}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(result: dict[str, Any]) -> str:
    how = (
        f"{result['rounds']} interleaved rounds, where no other number is given; ratios are medians, with quartiles, "
        "of time over SFT's in the same round"
    )
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    where = f"{result['machine']}, {threads}, torch {result['torch']}, {result['dtype']}"
    return f"`{result['command']}`; {where}; clock: {result['clock']}; {how}."


def case_table(one: dict[str, Any]) -> str:
    """Seconds, ratio with quartiles, arithmetic and memory of each variant, with the floors among them.

    `over the padded floor`: how much more than the floor's own measured time (SFT and the bare second pass) it took.
    """
    memory, flops, ratio = one.get("memory_mb", {}), one["flops"], one["ratio"]
    sft = sum(one["floor"]["sft"].values())
    heads = [
        "step", "seconds", "x SFT", "quartiles", "over the padded floor", "over the unpadded floor", "GFLOP",
        "FLOP x SFT",
    ] + ["peak MB", "x SFT"] * bool(memory)  # fmt: skip
    rows: list[list[str]] = []
    for name, spent in one["seconds"].items():
        row = [TITLES.get(name, f"`{name}`"), f"{spent:.3f}", f"{ratio[name]:.2f}", _quartiles(one, name)]
        row += [_over(one, floor, name) for floor in ("padded", "unpadded")]
        row += [f"{flops[name] / 1e9:,.1f}", f"{flops[name] / sft:.2f}"] if name in flops else ["", ""]
        if memory:
            row += _memory_cells(memory, name)
        rows.append(row)
    for title, decoder in (("padded", "decoder"), ("unpadded", "decoder_unpadded")):
        timed = f"{1 + ratio[decoder]:.2f}" if decoder in ratio else ""
        counted = one["floor"][f"floor_{title}"]
        row = [f"*floor, {title}*", "", timed, "", "", "", f"{counted * sft / 1e9:,.1f}", f"{counted:.2f}"]
        rows.append(row + ["", ""] * bool(memory))
    return table(heads, rows)


def _quartiles(one: dict[str, Any], name: str) -> str:
    found = one["quartiles"].get(name) if name != "sft" else None
    return f"{found[0]:.2f} to {found[1]:.2f}" if found else ""


def _over(one: dict[str, Any], floor: str, name: str) -> str:
    """Empty for what has no second pass, and where the floor was not timed."""
    if name in ("sft", "trainer", *PLAIN_PASSES) or floor not in one["over_floor"]:
        return ""
    return f"{100 * one['over_floor'][floor][name]:+.0f} %"


def _memory_cells(memory: dict[str, Any], name: str) -> list[str]:
    if name not in memory:
        return ["", ""]
    base = memory.get("sft", {}).get("total")
    return [f"{memory[name]['total']:,.0f}", f"{memory[name]['total'] / base:.2f}" if base else ""]


def _failures(one: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: left out: {why}" for name, why in one["failed"].items())


def floor_table(found: Sequence[dict[str, Any]]) -> str:
    """The arithmetic of each case, in TFLOP a micro-batch, and the floors as multiples of SFT's."""
    heads = [
        "theta", "model", "parameters", "trained", "tokens", "SFT F", "SFT B", "second F", "second B", "floor, padded",
        "floor, unpadded",
    ]  # fmt: skip
    rows = []
    for one in found:
        case, passes = (
            one["case"],
            [one["floor"][p][d] for p in ("sft", "second_pass") for d in ("forward", "backward")],
        )
        floor = one["floor"]
        rows.append(
            [case["theta"], case["size"], f"{floor['parameters'] / 1e6:,.0f} M", f"{floor['trained'] / 1e6:,.1f} M",
             f"{case['batch']} x {case['length']}", *(f"{n / 1e12:.3g}" for n in passes),
             f"{floor['floor_padded']:.2f}", f"{floor['floor_unpadded']:.2f}"]
        )  # fmt: skip
    return table(heads, rows)


def curve_table(found: dict[str, Any], axis: str) -> str:
    """Ratio to SFT at each point (time, peak memory); slopes: seconds grow as x^p, the ratio so much per doubling."""
    xs = next(iter(found.values()))["x"]
    heads = ["theta", "step", *(_point(x, axis) for x in xs), "seconds ~ x^p", "ratio per doubling"]
    rows = []
    for theta, part in found.items():
        for name, ratios in part["ratio"].items():
            p, slope = part["exponent"][name], part["per_doubling"][name]
            cells = [f"{r:.2f}" for r in ratios] + [""] * (len(xs) - len(ratios))
            rows.append(
                [theta, TITLES.get(name, f"`{name}`"), *cells, f"{p:.2f}", f"{slope:+.3f}" if is_number(slope) else ""]
            )
        rows.append([theta, "*floor, padded (counted)*", *(f"{r:.2f}" for r in part["floor_padded"]), "", ""])
        for name, ratios in part["memory"].items():
            cells = [f"{r:.2f}" for r in ratios]
            rows.append([theta, f"peak memory, {TITLES.get(name, name)}", *cells, "", ""])
    return table(heads, rows)


def _shared(found: dict[str, Any]) -> list[str]:
    """What the points of a curve have in common, a line a theta."""
    say = lambda at: ", ".join(f"{name} {value}" for name, value in at.items() if value is not None)
    return [f"{theta}: {say(part['at'])}." for theta, part in found.items()]


def _point(x: float, axis: str) -> str:
    return f"{x / 1e6:,.0f} M" if axis == "size" else f"{x:,.0f}"


def causes_table(causes: dict[str, dict[str, float]]) -> str:
    """What each step takes above the unpadded floor, in per cent of SFT's time, by cause."""
    heads = ["over the unpadded floor, % of SFT's time", *(TITLES.get(name, f"`{name}`") for name in causes)]
    names = next(iter(causes.values()))
    titles = {"total": "*all together*"}
    return table(heads, ([titles.get(n, n), *(f"{100 * part[n]:+.1f}" for part in causes.values())] for n in names))


def operations_table(one: dict[str, Any]) -> str:
    """Milliseconds by group of operations, and launches; `left over`: without SFT and the bare second pass, padded."""
    seconds, left = one["operations"], one["left_over"]
    heads = ["group", "SFT", "decoder alone", *(w for name in left for w in (name, "left over")), "optimizer"]
    rows = []
    for group in [*GROUPS, ELEMENTWISE, OTHER, "all"]:
        value = lambda part, group=group: sum(part.values()) if group == "all" else part[group]
        cells = [value(seconds["sft"]), value(seconds["decoder"])]
        for name in left:
            cells += [value(seconds[name]), value(left[name])]
        rows.append([group, *(f"{1000 * cell:,.1f}" for cell in [*cells, value(seconds["optimizer"])])])
    launches = one["launches"]
    floor = launches["sft"] + launches["decoder"]
    cells = [f"{launches['sft']:,}", f"{launches['decoder']:,}"]
    cells += [cell for name in left for cell in (f"{launches[name]:,}", f"{launches[name] - floor:,}")]
    rows.append(["*launches*", *cells, ""])
    return table(heads, rows)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in ([*heads], ["---"] * len(heads), *rows)]
    return "\n".join(lines)
