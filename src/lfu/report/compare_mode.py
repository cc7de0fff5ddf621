"""The results of a comparison at equal steps, or at equal time: rows of its tables, and remarks on them."""

from collections.abc import Mapping
from typing import Any

from lfu.report.metric_text import change, heading, mean_and_spread, metrics_in, turn, value
from lfu.study.metrics import Metric
from lfu.support.words import counted

Rows = list[list[str]]

UNSTEADY = 0.5  # distance of the quartiles of a run's step times over their median, from which ratios are rough
TITLES = {"steps": "Equal steps", "time": "Equal time"}
WORDS = {1: ["better"], -1: ["worse"], 0: []}


class Mode:
    """One mode of a record's results: `steps` or `time`."""

    def __init__(self, results: Mapping[str, Any], name: str):
        self.results, self.name, self.found = results, name, results["modes"][name]
        self.title, self.first = TITLES[name], name == next(iter(results["modes"]))
        self.metrics = metrics_in(results)
        values, ranks, costs = (self.found.get(what, {}) for what in ("values", "ranks", "cost"))
        # how many seeds of each setting are finished
        self.seeds = {label: len(one["seeds"]) for label, one in next(iter(values.values()), {}).items()}
        ranked = [count for label, count in self.seeds.items() if label not in self.found.get("failed", ())]
        # whether a setting has finished more seeds than are ranked
        self.fewer_ranked = bool(ranks) and max(ranked) > len(ranks["seeds"])
        self.memory = next((cost["memory_of"] for cost in costs.values() if cost["memory_of"]), "not known")
        self.machines = sorted({machine for cost in costs.values() for machine in cost["machines"]})
        self.busy = [label for label, cost in costs.items() if cost["unsteady"] > UNSTEADY]

    def called(self, what: str) -> str:
        """A heading or caption; of the second mode with its name."""
        return what if self.first else f"{what}, {self.title.lower()}"

    def file(self, stem: str) -> str:
        """A picture's file name; of the second mode with its name."""
        return stem if self.first else f"{stem}-{self.name}"

    def over(self) -> str:
        """What the values are a mean over."""
        counts = set(self.seeds.values())
        rest = " where no other number is given" if len(counts) > 1 else ""
        return f"mean ± standard deviation over {max(counts)} seeds{rest}" if max(counts) > 1 else "one seed"

    def _named(self, label: str) -> str:
        """A row's name, with its seeds where others have more."""
        most = max(self.seeds.values())
        count = self.seeds.get(label, most)
        return label if count == most else f"{label} ({counted(count, 'seed')})"

    # -- tables --------------------------------------------------------------------------------------------------------

    def values(self) -> Rows:
        """The untouched model's values, and each setting's; the rank in front, where a narrow page shows it."""
        ranks = self.found["ranks"].get("average")
        rank = lambda label: [] if not ranks else [f"{ranks[label]:.1f}" if label in ranks else "-"]
        rows = [["", *(["rank"] if ranks else []), *map(heading, self.metrics.values())]]
        base = [value(metric, self.results["untouched"][key]) for key, metric in self.metrics.items()]
        rows.append(["untouched", *rank("untouched"), *base])
        for label in self.seeds:
            cells = [mean_and_spread(metric, self.found["values"][key][label]) for key, metric in self.metrics.items()]
            rows.append([self._named(label), *rank(label), *cells])
        return rows

    def differences(self) -> list[tuple[str, Rows]]:
        """Against plain SFT; of what has no plain SFT to be compared with, which is plain SFT itself, against the
        untouched model."""
        against = {label: one["against"] for label, one in self.results["settings"].items()}
        flags = any(rival not in ("sft", "untouched") for rival in against.values())
        told = " with the same training flags; plain SFT with flags of its own: against that without" if flags else ""
        alone = {
            key: {label: interval for label, interval in each.items() if against[label] == "untouched"}
            for key, each in self.found["against_untouched"].items()
        }
        each = [(f"plain SFT{told}", self.found["against_sft"]), ("the untouched model", alone)]
        return [(to, rows) for to, changes in each if (rows := self._differences(changes))[1:]]

    def _differences(self, changes: Mapping[str, Any]) -> Rows:
        rows = [["", *(f"{metric.title} ({metric.items})" for metric in self.metrics.values())]]
        for label in dict.fromkeys(label for each in changes.values() for label in each):
            cells = [_cell(metric, changes[key].get(label)) for key, metric in self.metrics.items()]
            rows.append([self._named(label), *cells])
        return rows

    def changes(self) -> Rows:
        """Questions kept, lost, gained and never right."""
        names = ("kept", "lost", "gained", "never")
        return [["", *names]] + [
            [f"{name}: {label}", *(f"{counts[what]:.1f}" for what in names)]
            for name, each in self.found["changes"].items()
            for label, counts in each.items()
        ]

    def costs(self) -> Rows:
        """Time, memory and size of each setting's training."""
        rows = [["", "per step, s", "over SFT's", "steps", "training, s", "once, s", "peak memory, MiB", "trainable",
                 "rows", "weights moved, %"]]  # fmt: skip
        known = lambda found, form, scale=1.0: "-" if found is None else format(scale * found, form)
        for label, cost in self.found["cost"].items():
            rows.append([
                label, f"{cost['step_seconds']:.3g}", known(cost["ratio"], ".2f"), str(cost["steps"]),
                f"{cost['train_seconds']:,.1f}", f"{cost['prepare_seconds']:,.1f}",
                known(cost["peak_memory"], ",.0f", 2**-20), f"{cost['trainable']:,}", f"{cost['rows']:,}",
                known(cost["distance"], ".3f", 100),
            ])  # fmt: skip
        return rows


def _cell(metric: Metric, interval: Mapping[str, Any] | None) -> str:
    if interval is None:
        return "-"
    middle, _, ends = change(metric, interval).partition(" ")
    return "\n".join([middle, ends, *WORDS[turn(metric, interval)]])
