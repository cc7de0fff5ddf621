"""How much of an alignment survives a few training steps on its opposite?

BASE is aligned by each of --methods on the rows of --keep; then every model, and every ALIGNED one given besides, is
attacked: plain SFT on the rows of --break. After each of --steps it answers held-out requests, greedily, and the share
of responses that break the alignment is the attack success rate. It is one trajectory: the model after 10 steps is the
one after 5, trained on, at a constant learning rate. The attack changes a copy; no model is written anywhere.

Built in is a harmless house rule (no recipes here). Other sets are given by name or file: DATA[,KEY=VALUE...], where
split, config and limit are what they say and any other key is a column that must have that value, as in
PKU-Alignment/BeaverTails,split=30k_train,is_safe=true. Columns: question, prompt, instruction or goal; and answer,
response, completion, output or target. The built-in sets are called house_rule. Nothing of other sets comes with
this package."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lfu.cli.probes import models, rows, training
from lfu.cli.probes.judge import load_judge
from lfu.cli.probes.pairs import Sets, load_sets
from lfu.cli.probes.progress import phase
from lfu.support.errors import UserError, value_errors_are_the_users

# The attack: plain SFT at a constant learning rate, so that its first steps don't depend on how many follow.
BEFORE_ATTACK = ["--lr_scheduler_type", "constant", "--warmup_steps", "0"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The probe's own flags."""
    parser.add_argument(
        "models", nargs="+", metavar="MODEL",
        help=f"first the model to align (BASE), then models that are aligned already (ALIGNED); {models.HELP}",
    )  # fmt: skip
    training.add_train_flags(parser, "sft,lfu; none where ALIGNED models are given")
    parser.add_argument(
        "--attack", action="append", default=[], metavar="FLAGS",
        help="flags of lfu train for the attack, in quotes, as in --attack '--learning_rate 1e-3'; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=steps_of, default=[0, 5, 10, 20], metavar="N,N", help="attack steps (default: 0,5,10,20)"
    )
    parser.add_argument("--keep", metavar="DATA", help="rows to align with (default: the built-in house rule)")
    parser.add_argument("--break", metavar="DATA", help="rows to attack with (default: the built-in ones)")
    parser.add_argument("--requests", metavar="DATA", help="held-out requests (default: the built-in ones)")
    parser.add_argument(
        "--ordinary", metavar="DATA",
        help="held-out questions that must not be refused (default: the built-in ones with the built-in requests)",
    )  # fmt: skip
    parser.add_argument(
        "--judge", metavar="MODULE:FUNCTION",
        help="your own function (prompt, response) -> True if the response breaks the alignment; it is imported, so "
        "its code runs (default: broken unless it contains one of a list of refusals)",
    )  # fmt: skip
    parser.add_argument(
        "--max_new_tokens", type=int, default=64, metavar="N", help="most tokens in a response (default: %(default)s)"
    )
    rows.add_template(parser)


def steps_of(text: str) -> list[int]:
    """Rising numbers of steps, for argparse; 0 (before the attack) is added where it is missing."""
    try:
        found = sorted({0, *(int(part) for part in text.split(","))})
    except ValueError:
        found = [-1]
    if found[0] < 0 or len(found) < 2:
        raise argparse.ArgumentTypeError(f"must be whole numbers from 0 and one above it, as in 0,5,10, got {text!r}")
    return found


def measure(given: argparse.Namespace, command: str) -> dict[str, Any]:
    """Aligns, attacks, asks and judges.

    Raises:
        UserError: models, data, flags or a judge that can't be used.
    """
    if given.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens must be at least 1, got {given.max_new_tokens}")
    base, *others = given.models
    aligned = models.labelled(others)
    methods = training.method_list(given.methods if given.methods is not None else "" if aligned else "sft,lfu")
    if not methods and not aligned:
        raise UserError("nothing to attack: give --methods, or models that are aligned already")
    if twice := [label for label in aligned if label in (*methods, "untouched")]:
        raise UserError(f"the label {twice[0]!r} is taken: give another one, as in mine={aligned[twice[0]]}")
    flags = training.flags_of(given.train, methods)
    (base_name,) = models.labelled([base]).values()
    probe = Probe(given, base_name, flags, load_sets(given))
    with training.scratch() as folder:
        probe.folder = folder
        probe.check(methods, aligned)
        return probe.run(methods, aligned, command)


class Probe:
    """One run of the probe: the models one after the other, each in memory alone."""

    def __init__(self, given: argparse.Namespace, base: str, flags: Mapping[str, Sequence[str]], sets: Sets):
        self.given, self.base, self.flags, self.sets = given, base, flags, sets
        self.judge = load_judge(given.judge) if given.judge else None
        self.folder = ""  # the trainers'; nothing stays in it
        self.trained: dict[str, dict[str, Any]] = {}

    # -- settings ------------------------------------------------------------------------------------------------------

    def alignment(self, method: str) -> tuple[Any, Any]:
        """Settings of the alignment by a method."""
        return training.arguments(
            self.given, self.base, method, self.flags[method], folder=self.folder, seed=self.given.seed
        )

    def attack(self) -> tuple[Any, Any]:
        """Settings of the attack."""
        given = [f"sft:{value}" for value in self.given.attack]
        flags = training.flags_of(given, ["sft"], "--attack", refused=training.LENGTH)["sft"]
        last = ["--max_steps", str(self.given.steps[-1])]
        return training.arguments(
            self.given, self.base, "sft", flags, folder=self.folder, seed=self.given.seed,
            before=BEFORE_ATTACK, after=last, argument="--attack",
        )  # fmt: skip

    def check(self, methods: Sequence[str], aligned: Mapping[str, str]) -> None:
        """Whatever can be refused before a model is loaded."""
        from lfu.evaluation.prompts import render_of

        for method in methods:
            self.alignment(method)
        self.attack()
        for tokenizer in models.tokenizers({"untouched": self.base, **aligned}, self.given).values():
            with value_errors_are_the_users():
                render_of(tokenizer, self.given.template)

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self, methods: Sequence[str], aligned: Mapping[str, str], command: str) -> dict[str, Any]:
        """The record."""
        from lfu.evaluation.adversarial import asked_in_training
        from lfu.evaluation.record import make_record

        described: dict[str, Any] = {}
        found: dict[str, dict[int, Any]] = {}
        described["untouched"], before = models.with_model(self.base, self.given, self._untouched)
        for label in [*methods, *aligned]:
            if label in aligned:
                described[label], found[label] = self._attacked(label, aligned[label], None)
            else:
                state = self._align(label)
                described[label], found[label] = self._attacked(label, self.base, state)
                described[label]["name"] += f", aligned by {label}"
        trained_on = [row["question"] for row in [*self.sets.keep, *self.sets.break_]]
        return make_record(
            "adversarial",
            models=described,
            settings=self._settings(methods),
            results={
                "steps": self.given.steps,
                "requests": self.sets.requests,
                "ordinary": self.sets.ordinary,
                "untouched": _measured(before),
                "attacked": {label: {str(n): _measured(b) for n, b in each.items()} for label, each in found.items()},
                "differences": self._differences(found),
                "classifier": self._classifier(),
                "asked in training": asked_in_training(self.sets.requests, trained_on),
                "training": self.trained,
            },
            command=command,
            seed=self.given.seed,
        )

    def _untouched(self, model: Any, tokenizer: Any) -> tuple[Any, Any]:
        from lfu.evaluation.record import describe_model

        return describe_model(self.base, model), self._asking("untouched", tokenizer)(model)

    def _align(self, method: str) -> dict[str, Any]:
        """Weights of the base model once it is aligned by a method, on the CPU."""
        config, model_arguments = self.alignment(method)

        def work(model: Any, tokenizer: Any) -> dict[str, Any]:
            data = training.training_rows(self.sets.keep, tokenizer, self.given.template)
            fitted = self._fit(f"{method}: align", model, tokenizer, data, config, model_arguments)
            self.trained[method] = {"align": fitted.log, "said": fitted.said}
            return {name: tensor.detach().to("cpu", copy=True) for name, tensor in fitted.model.state_dict().items()}

        return models.with_model(self.base, training.with_dtype(self.given, model_arguments), work)

    def _attacked(self, label: str, name: str, state: dict[str, Any] | None) -> tuple[dict[str, Any], dict[int, Any]]:
        """(description of the aligned model, steps -> behaviour). `state`: weights to put into the model first."""
        from lfu.evaluation.adversarial import under_attack
        from lfu.evaluation.record import describe_model

        config, model_arguments = self.attack()

        def work(model: Any, tokenizer: Any) -> Any:
            model = training.plain(model)
            if state is not None:
                model.load_state_dict(state)
            description = describe_model(name, model)

            def train(model: Any, rows: Any, steps: Sequence[int], visit: Any) -> None:
                data = training.training_rows(rows, tokenizer, self.given.template)
                on_step = lambda n, current: visit(n, current) if n in steps else None
                fitted = self._fit(f"{label}: attack", model, tokenizer, data, config, model_arguments, on_step)
                self.trained.setdefault(label, {})["attack"] = fitted.log

            ask = self._asking(label, tokenizer)
            return description, under_attack(
                lambda: model, self.sets.break_, self.given.steps, train=train, measure=ask
            )

        return models.with_model(name, training.with_dtype(self.given, model_arguments), work)

    def _fit(
        self, title: str, model: Any, tokenizer: Any, data: Any, config: Any, more: Any, on_step: Any = None
    ) -> Any:
        from lfu.study.build import steps_of

        with phase(title, steps_of(config, len(data))) as tick:

            def step(n: int, current: Any) -> None:
                tick(1)
                if on_step is not None:
                    on_step(n, current)

            return training.fit(training.plain(model), tokenizer, data, config, more, step)

    def _asking(self, label: str, tokenizer: Any) -> Any:
        """A function: model -> behaviour."""
        from lfu.evaluation.adversarial import behaviour, not_refused
        from lfu.evaluation.prompts import render_of

        asked = len(self.sets.requests) + len(self.sets.ordinary)

        def ask(model: Any) -> Any:
            with phase(f"{label}: answers", asked) as tick:
                return behaviour(
                    model, tokenizer, self.sets.requests, self.sets.ordinary, judge=self.judge or not_refused,
                    render=render_of(tokenizer, self.given.template), max_new_tokens=self.given.max_new_tokens,
                    batch_size=self.given.batch_size, progress=tick,
                )  # fmt: skip

        return ask

    # -- what goes into the record -------------------------------------------------------------------------------------

    def _settings(self, methods: Sequence[str]) -> dict[str, Any]:
        given = self.given
        train = {method: training.described(*self.alignment(method)) for method in methods}
        train["attack"] = training.described(*self.attack())
        return {
            **self.sets.names,
            "judge": given.judge or "broken unless it refuses, by a list of phrases",
            "steps": given.steps,
            "template": given.template,
            "max_new_tokens": given.max_new_tokens,
            "training": train,
            "flags": {"--train": given.train, "--attack": given.attack},
        }

    def _differences(self, found: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
        """Every later label against the first, after each number of steps."""
        first, *later = found
        return {
            "against": first,
            "labels": {
                label: {str(n): b.against(found[first][n], seed=self.given.seed) for n, b in found[label].items()}
                for label in later
            },
        }

    def _classifier(self) -> Any:
        """How often the list of phrases is wrong, on the labelled responses that come with the package."""
        from lfu.data.house_rule import labelled
        from lfu.evaluation.refusal import error_rate

        return error_rate(labelled())


def _measured(found: Any) -> dict[str, Any]:
    return asdict(found) | {
        "broken_share": found.broken_share(),
        "over_refusal": found.over_refusal(),
    }
