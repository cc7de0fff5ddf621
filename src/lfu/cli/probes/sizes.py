"""What does a model learn, and what does it forget, from 8, 32, 128 or 512 training rows?

Every method trains the same base on nested sets: the 8 rows are among the 32. --equal says what is the same at all
sizes, the epochs or the steps. Measured: the loss on held-out answers (what is learned), general knowledge and prose
(what is kept). Finished trainings are kept in the output folder, so a sweep that was stopped goes on where it was."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lfu.cli.probes import models, rows, training
from lfu.cli.probes.progress import phase
from lfu.support.errors import UserError, one_line, value_errors_are_the_users

BUILT_IN = "word_problems"
POOL = 512
HELD_OUT = 100  # built-in problems, where --limit says nothing else


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The probe's own flags."""
    parser.add_argument("model", metavar="BASE", help=f"the model to train; {models.HELP}")
    training.add_train_flags(parser, "sft,lfu")
    parser.add_argument(
        "--sizes", type=sizes_of, default=[8, 32, 128, 512], metavar="N,N", help="training rows (default: 8,32,128,512)"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="trainings of each kind, seeds from --seed on"
    )
    parser.add_argument(
        "--equal", choices=["epochs", "steps"], default="epochs", help="what all sizes have in common (default: epochs)"
    )
    parser.add_argument("--epochs", type=float, default=3.0, metavar="N", help="with --equal epochs (default: 3)")
    parser.add_argument("--steps", type=int, default=32, metavar="N", help="with --equal steps (default: 32)")
    parser.add_argument(
        "--data", default=BUILT_IN, metavar="DATA", help="training rows (default: built-in word problems)"
    )
    parser.add_argument("--data_config", metavar="NAME", help="configuration of a hub data set")
    parser.add_argument("--data_split", default="train", metavar="SPLIT", help="split of --data (default: train)")
    parser.add_argument("--eval_data", metavar="DATA", help="held-out rows (default: --data)")
    parser.add_argument("--eval_split", default="test", metavar="SPLIT", help="split of --eval_data (default: test)")
    rows.add_template(parser)


def sizes_of(text: str) -> list[int]:
    """Rising numbers of rows, for argparse."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise argparse.ArgumentTypeError(f"must be whole numbers from 1, as in 8,32,128, got {text!r}")
    return found


def measure(given: argparse.Namespace, command: str) -> dict[str, Any]:
    """Trains and measures every cell.

    Raises:
        UserError: models, data or flags that can't be used.
    """
    for name in ("seeds", "epochs", "steps"):
        if not getattr(given, name) > 0:
            raise UserError(f"--{name} must be above 0, got {getattr(given, name)}")
    methods = training.method_list(given.methods if given.methods is not None else "sft,lfu")
    if not methods:
        raise UserError("no method to train by: give --methods, as in --methods sft,lfu")
    flags = training.flags_of(given.train, methods, refused=training.LENGTH)
    (base,) = models.labelled([given.model]).values()
    with training.scratch() as folder:
        sweep = Sweep(given, base, methods, flags, folder)
        sweep.check()
        return sweep.run(command)


class Sweep:
    """One run of the probe: all trainings, one model in memory at a time."""

    def __init__(
        self, given: argparse.Namespace, base: str, methods: Sequence[str], flags: dict[str, list[str]], folder: str
    ):
        self.given, self.base, self.methods, self.flags, self.folder = given, base, methods, flags, folder
        self.train_rows, self.held_out = load(given)
        self.questions, self.texts = retention(given)
        self.tokenizer: Any = None
        self.seeds = list(range(given.seed, given.seed + given.seeds))

    def arguments(self, method: str, seed: int) -> tuple[Any, Any]:
        """Settings of one training."""
        given = self.given
        equal = ["--num_train_epochs", str(given.epochs), "--max_steps", "-1"]
        if given.equal == "steps":
            equal = ["--max_steps", str(given.steps)]
        return training.arguments(
            given, self.base, method, self.flags[method], folder=self.folder, seed=seed, after=equal
        )

    def check(self) -> None:
        """Whatever can be refused before a model is loaded."""
        from lfu.evaluation.prompts import render_of

        for method in self.methods:
            self.arguments(method, self.given.seed)
        self.tokenizer = models.tokenizers({"base": self.base}, self.given)["base"]
        with value_errors_are_the_users():
            render_of(self.tokenizer, self.given.template)

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self, command: str) -> dict[str, Any]:
        """The record."""
        from lfu.evaluation import sizes
        from lfu.evaluation.adversarial import asked_in_training
        from lfu.evaluation.record import describe_model, make_record

        described = models.with_model(self.base, self.given, lambda model, _: describe_model(self.base, model))
        settings = self._settings()
        kept = _kept(Path(self.given.output_dir) / "cells", self._fingerprint(described), settings["training"])
        cells = sizes.cells_of(self.methods, self.given.sizes, self.seeds)
        with value_errors_are_the_users():
            base = self._untouched(kept)
            found = {}
            for cell, scores, again in sizes.sweep(
                cells, self.train_rows, train=self._train, measure=self._measure, kept=kept
            ):
                found[cell] = scores
                if again:
                    _say(f"{_name(cell)}: kept from an earlier run")
            summary = sizes.summarise(base, found, seed=self.given.seed)
            values = {name: asdict(interval) for name, interval in sizes.base_values(base).items()}
        trained_on = [row["question"] for row in self.train_rows]
        return make_record(
            "sizes",
            models={"base": described},
            settings=settings,
            results={
                "base": values,
                "summary": summary,
                "items": {"answers": len(self.held_out), "knowledge": len(self.questions), "prose": len(self.texts)},
                "asked in training": len(asked_in_training([row["question"] for row in self.held_out], trained_on)),
                "cells": [asdict(cell) | {"scores": scores} for cell, scores in found.items()],
                "base scores": base,
            },
            command=command,
            seed=self.given.seed,
        )

    def _untouched(self, kept: Any) -> dict[str, Any]:
        """The base's scores."""
        from lfu.evaluation.sizes import Cell

        cell = Cell("base", 0, 0)
        scores = kept.load(cell)
        if scores is None:
            scores = models.with_model(self.base, self.given, lambda model, _: self._measure(model))
            kept.save(cell, scores)
        return scores

    def _train(self, cell: Any, chosen: Sequence[Any], measure: Any) -> dict[str, Any]:
        """Trains one cell from the base as it is on disk."""
        config, more = self.arguments(cell.method, cell.seed)

        def work(model: Any, tokenizer: Any) -> dict[str, Any]:
            data = training.training_rows(chosen, tokenizer, self.given.template)
            with phase(f"{_name(cell)}: train", training.steps_in(config, len(data))) as tick:
                fitted = training.fit(training.plain(model), tokenizer, data, config, more, lambda n, _: tick(1))
            return measure(fitted.model) | {"log": fitted.log, "said": fitted.said}

        return models.with_model(self.base, training.with_dtype(self.given, more), work)

    def _measure(self, model: Any) -> dict[str, Any]:
        from lfu.evaluation.hidden import longest_input
        from lfu.evaluation.prompts import render_of
        from lfu.evaluation.sizes import measure as scores_of

        with phase("scores", len(self.held_out) + len(self.questions) + len(self.texts)) as tick:
            return scores_of(
                model, self.tokenizer, self.held_out, self.questions, self.texts,
                render=render_of(self.tokenizer, self.given.template), batch_size=self.given.batch_size,
                window=longest_input(model), progress=tick,
            )  # fmt: skip

    # -- what decides a cell -------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        given = self.given
        what = f"{given.epochs:g} epochs" if given.equal == "epochs" else f"{given.steps} steps"
        return {
            "data": f"{given.data} ({len(self.train_rows)})",
            "held-out rows": f"{given.eval_data or given.data}, {given.eval_split} ({len(self.held_out)})",
            "general knowledge": f"built-in ({len(self.questions)})",
            "prose": f"built-in ({len(self.texts)})",
            "sizes": given.sizes,
            "seeds": self.seeds,
            "equal": what,
            "template": given.template,
            "training": {
                method: training.described(*self.arguments(method, given.seed)) | {"flags": self.flags[method]}
                for method in self.methods
            },
        }

    def _fingerprint(self, described: Mapping[str, Any]) -> dict[str, Any]:
        """What all cells depend on beside their method; not the other sizes, seeds and methods of this run."""
        from lfu.evaluation.record import versions

        data = [self.train_rows, self.held_out, self.questions, self.texts]
        digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
        return {
            "model": dict(described), "data": digest, "template": self.given.template, "dtype": self.given.dtype,
            "versions": versions(),
        }  # fmt: skip


def _kept(folder: Path, settings: Mapping[str, Any], by_method: Mapping[str, Any]) -> Any:
    """`lfu.evaluation.sizes.Kept`, for which a full disk is the user's to put right."""
    from lfu.evaluation.sizes import Kept

    class KeptOnDisk(Kept):
        def save(self, cell: Any, scores: Mapping[str, Any]) -> None:
            try:
                super().save(cell, scores)
            except OSError as error:
                raise UserError(f"output folder {self.folder} can't be written: {one_line(error)}") from error

    return KeptOnDisk(folder, settings, by_method)


def _name(cell: Any) -> str:
    return f"{cell.method}, {cell.size} rows, seed {cell.seed}"


def _say(text: str) -> None:
    print(f"lfu probe: {text}", file=sys.stderr)


# --- data ----------------------------------------------------------------------------------------------------------


def load(given: argparse.Namespace) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training rows, held-out rows), each `{"question", "answer"}`.

    Raises:
        UserError: as `load_rows`; too few training rows; nothing held out.
    """
    from lfu.data.load import load_rows

    most = given.sizes[-1]
    if given.data == BUILT_IN:  # the same pool for all sizes up to 512: a sweep with one more size keeps its rows
        trained = load_rows(f"{BUILT_IN}:{max(POOL, most)}", split=given.data_split)
    else:
        trained = load_rows(given.data, split=given.data_split, config=given.data_config)
    if len(trained) < most:
        raise UserError(f"data {given.data}: {len(trained)} rows, and --sizes wants {most}: give smaller sizes")
    evaluated = given.eval_data or given.data
    if given.eval_data is None and Path(given.data).expanduser().is_file():
        raise UserError(f"data {given.data} is one file, which is trained on: give held-out rows with --eval_data")
    config = given.data_config if evaluated == given.data else None
    built_in = evaluated == BUILT_IN
    held_out = load_rows(
        f"{BUILT_IN}:{given.limit or HELD_OUT}" if built_in else evaluated,
        split=given.eval_split, config=config, limit=given.limit,
    )  # fmt: skip
    return _pairs(trained, given.data), _pairs(held_out, evaluated)


def _pairs(dataset: Any, name: str) -> list[dict[str, str]]:
    return [
        {"question": row["question"], "answer": row["answer"]}
        for row in rows.answered(rows.question_rows(dataset, name))
    ]


def retention(given: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """The built-in general knowledge and prose."""
    from lfu.data.probes import general_knowledge, plain_text

    return general_knowledge()[: given.limit], [row["text"] for row in plain_text()][: given.limit]
