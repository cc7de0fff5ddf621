"""MMLU as one task over all subjects, with the prompts of the harness's 57: made from their shared template."""

from collections import defaultdict
from itertools import zip_longest
from typing import Any

from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask


class MMLU(ConfigurableTask):
    """Worked examples are the first of the item's own subject, as in the harness's task of that subject.

    Items take turns by subject (the first of each, then the second of each, ...), so that the first N are spread over
    all subjects; in the order of the files they would be abstract algebra.
    """

    dataset: Any

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **more: Any) -> None:
        super().download(dataset_kwargs, **more)
        self.dataset = {split: rows.select(_in_turn(list(rows["subject"]))) for split, rows in self.dataset.items()}
        self._pools: dict[str, list[Any]] = defaultdict(list)

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, **more: Any) -> str | list[str]:
        if num_fewshot:
            if not self._pools:
                for row in self.fewshot_docs():
                    self._pools[row["subject"]].append(row)
            pool = self._pools[doc["subject"]]
            if len(pool) < num_fewshot:
                raise ValueError(f"{num_fewshot} examples asked for, {doc['subject']} has {len(pool)}")
            self.sampler = FirstNSampler(pool)
        return super().fewshot_context(doc=doc, num_fewshot=num_fewshot, **more)


def _in_turn(subjects: list[str]) -> list[int]:
    """Indices: the first row of each subject in order of appearance, then the second of each, and so on."""
    rows: dict[str, list[int]] = defaultdict(list)
    for index, subject in enumerate(subjects):
        rows[subject].append(index)
    return [index for turn in zip_longest(*rows.values()) for index in turn if index is not None]
