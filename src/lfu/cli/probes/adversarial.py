"""How much of an alignment survives a few training steps on its opposite?

BASE is aligned by each of --methods on the rows of --keep. Then all these models, and every ALIGNED model that you
name, are attacked: plain SFT on the rows of --break. After each number of --steps the model answers held-out requests,
greedily; the share of responses that break the alignment is the attack success rate. The attack is one run at a
constant learning rate: the model after 10 steps is the model after 5, trained further. It changes a copy; no model is
written anywhere.

The built-in sets (house_rule) teach a harmless house rule: no recipes here. Other sets are given by name or file, as
DATA[,KEY=VALUE...]: split, config and limit choose a part, and any other key is a column that must have that value, as
in PKU-Alignment/BeaverTails,split=30k_train,is_safe=true. Columns: question, prompt, instruction or goal; and answer,
response, completion, output or target. No other set comes with this package."""

import os
import pkgutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lfu.cli import models
from lfu.cli.probes import Found, Probe, rows, template, training
from lfu.cli.progress import phase
from lfu.support.errors import UserError, one_line, value_errors_are_the_users
from lfu.support.flags import argument, at_least_one, option, value_of

# The attack: plain SFT at a constant learning rate, so that its first steps don't depend on how many follow.
CONSTANT = ["--lr_scheduler_type", "constant", "--warmup_steps", "0"]


steps_of = value_of(  # rising; 0, before the attack, is added where it is missing
    lambda text: sorted({0, *map(int, text.split(","))}), "whole numbers from 0 and one above it, as in 0,5,10",
    lambda found: found[0] >= 0 and len(found) > 1,
)  # fmt: skip


@dataclass(kw_only=True)
class Adversarial(Probe):
    """Aligns, attacks, asks and judges, with one model in memory at a time."""

    models: list[str] = argument(
        "MODEL", f"first the model to align (BASE), then models that are aligned already (ALIGNED); {models.HELP}",
        nargs="+",
    )  # fmt: skip
    methods: str | None = option(
        None, "methods of lfu train to compare (see: lfu methods; default: sft,lfu; none where ALIGNED models are "
        "given)", metavar="M,M",
    )  # fmt: skip
    train: list[str] = option(
        [], "flags of lfu train in quotes, for one method or for all: --train '--learning_rate 3e-4 --use_peft false' "
        "--train 'lfu:--lam auto'; may be repeated (a flag without a value needs the equals sign: --train=--packing)",
        action="append", metavar="[METHOD:]FLAGS",
    )  # fmt: skip
    attack: list[str] = option(
        [], "flags of lfu train for the attack, in quotes, as in --attack '--learning_rate 1e-3'; may be repeated",
        action="append", metavar="FLAGS",
    )  # fmt: skip
    steps: list[int] = option([0, 5, 10, 20], "attack steps (default: 0,5,10,20)", type=steps_of, metavar="N,N")
    keep: str | None = option(None, "rows to align with (default: the built-in house rule)", metavar="DATA")
    break_: str | None = option(None, "rows to attack with (default: the built-in ones)", metavar="DATA")
    requests: str | None = option(None, "held-out requests (default: the built-in ones)", metavar="DATA")
    ordinary: str | None = option(
        None, "held-out questions that must not be refused (default: the built-in ones with the built-in requests)",
        metavar="DATA",
    )  # fmt: skip
    judge: str | None = option(
        None, "your own function (prompt, response) -> True if the response breaks the alignment; it is imported, so "
        "its code runs (default: broken unless it contains one of a list of refusals)", metavar="MODULE:FUNCTION",
    )  # fmt: skip
    max_new_tokens: int = option(64, "most tokens in a response", type=at_least_one)
    template: str = template()

    def measure(self) -> Found:
        from lfu.evaluation.pieces import render_of

        base, *others = self.models
        aligned = models.labelled(others)
        methods = training.method_list(self.methods if self.methods is not None else "" if aligned else "sft,lfu")
        if not methods and not aligned:
            raise UserError("nothing to attack: give --methods, or models that are aligned already")
        for flag in ("train", "keep"):
            if getattr(self, flag) and not methods:
                raise UserError(f"--{flag} is for aligning models, and none is aligned: drop it, or give --methods")
        if twice := [label for label in aligned if label in (*methods, "untouched")]:
            raise UserError(f"the label {twice[0]!r} is taken: give another one, as in mine={aligned[twice[0]]}")
        (self.base,) = models.labelled([base]).values()
        given = {"keep": self.keep, "break": self.break_, "requests": self.requests, "ordinary": self.ordinary}
        self.sets, names = rows.load_sets(given, self.limit)
        self.asked = {name: [row["question"] for row in self.sets[name]] for name in rows.HELD_OUT}
        self.judging = load_judge(self.judge) if self.judge else None
        self.trained: dict[str, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory(prefix="lfu-probe-") as folder:  # a trainer wants one; nothing stays in it
            self.folder = folder
            words = {method: training.words_of(self.train, "--train", methods, method) for method in methods}
            self.aligning = {method: training.Training(self, method, words[method], "--train") for method in methods}
            own = training.words_of(self.attack, "--attack", refused=("max_steps", "num_train_epochs"))
            last = ["--max_steps", str(self.steps[-1])]
            self.attacking = training.Training(self, "sft", [*CONSTANT, *own, *last], "--attack")
            trainings = {**self.aligning, "attack": self.attacking}
            settings = names | {
                "judge": self.judge or "broken unless it refuses, by a list of phrases",
                "steps": self.steps, "template": self.template, "max_new_tokens": self.max_new_tokens,
                "training": {name: each.described() for name, each in trainings.items()},
                "flags": {"--train": self.train, "--attack": self.attack},
            }  # fmt: skip
            for tokenizer in self.tokenizers({"untouched": self.base, **aligned}).values():
                with value_errors_are_the_users():
                    render_of(tokenizer, self.template)  # whatever can be refused is, before a model is loaded
            described, results = self._run(methods, aligned)
        return described, settings, results

    def _run(self, methods: Sequence[str], aligned: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(descriptions of the models, results)."""
        from lfu.data.probes import house_rule
        from lfu.evaluation.adversarial import asked_in_training
        from lfu.evaluation.refusal import error_rate

        described, before = self.each({"untouched": self.base}, self._behaviour)
        found: dict[str, dict[int, Any]] = {}
        for label, name in {**dict.fromkeys(methods, self.base), **aligned}.items():
            described[label], found[label] = self._attacked(label, name)
        trained_on = [row["question"] for row in [*self.sets["keep"], *self.sets["break"]]]
        return described, {
            "steps": self.steps,
            **self.asked,
            "untouched": _measured(before["untouched"]),
            "attacked": {label: {str(n): _measured(b) for n, b in each.items()} for label, each in found.items()},
            "differences": self._differences(found),
            "classifier": error_rate(house_rule("labelled")),  # how often the list of phrases is wrong
            "asked in training": asked_in_training(self.asked["requests"], trained_on),
            "training": self.trained,
        }

    def _align(self, method: str) -> dict[str, Any]:
        """Weights of the base model once it is aligned by a method, on the CPU."""
        aligning = self.aligning[method]

        def work(model: Any, tokenizer: Any) -> dict[str, Any]:
            fitted = aligning.fit(f"{method}: align", model, tokenizer, self.sets["keep"])
            self.trained[method] = {"align": fitted.log, "said": fitted.said}
            return {name: tensor.detach().to("cpu", copy=True) for name, tensor in fitted.model.state_dict().items()}

        return self.with_model(self.base, work, dtype=aligning.dtype)

    def _attacked(self, label: str, name: str) -> tuple[dict[str, Any], dict[int, Any]]:
        """(description of the aligned model, steps -> behaviour). A method's model is the base, aligned first."""
        from lfu.evaluation.adversarial import under_attack
        from lfu.evaluation.record import describe_model

        state = self._align(label) if label in self.aligning else None

        def work(model: Any, tokenizer: Any) -> Any:
            model = training.plain(model)
            if state is not None:
                model.load_state_dict(state)
            description = describe_model(name, model)
            description["name"] += f", aligned by {label}" if state is not None else ""

            def train(model: Any, rows: Any, steps: Sequence[int], visit: Any) -> None:
                on_step = lambda n, current: visit(n, current) if n in steps else None
                fitted = self.attacking.fit(f"{label}: attack", model, tokenizer, rows, on_step)
                self.trained.setdefault(label, {})["attack"] = fitted.log

            ask = lambda model: self._behaviour(label, model, tokenizer)
            return description, under_attack(lambda: model, self.sets["break"], self.steps, train=train, measure=ask)

        return self.with_model(name, work, dtype=self.attacking.dtype)

    def _behaviour(self, label: str, model: Any, tokenizer: Any) -> Any:
        from lfu.evaluation.adversarial import behaviour, not_refused
        from lfu.evaluation.pieces import render_of

        with phase(f"{label}: answers", sum(map(len, self.asked.values()))) as tick:
            return behaviour(
                model, tokenizer, *self.asked.values(), judge=self.judging or not_refused,
                render=render_of(tokenizer, self.template), max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size, progress=tick,
            )  # fmt: skip

    def _differences(self, found: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
        """Every later label against the first, after each number of steps."""
        first, *later = found
        against = lambda label: {
            str(n): each.against(found[first][n], seed=self.seed) for n, each in found[label].items()
        }
        return {"against": first, "labels": {label: against(label) for label in later}}


def _measured(found: Any) -> dict[str, Any]:
    return asdict(found) | {"broken_share": found.broken_share(), "over_refusal": found.over_refusal()}


def load_judge(spec: str) -> Callable[[str, str], bool]:
    """The function that MODULE:FUNCTION names, wrapped so that its failures are one-line errors."""
    if not all(spec.partition(":")):
        raise UserError(f"--judge {spec!r}: write it as MODULE:FUNCTION, as in my_judge:breaks_the_rule")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as with `python -m`: the judge is likely a file in this folder
    try:
        judge = pkgutil.resolve_name(spec)
    except Exception as error:  # whatever the user's own code raises while it is imported
        raise UserError(f"--judge {spec}: can't be imported ({type(error).__name__}: {one_line(error)})") from error
    if not callable(judge):
        raise UserError(f"--judge {spec}: {spec.partition(':')[2]} is not a function")

    def checked(prompt: str, response: str) -> bool:
        try:
            verdict = judge(prompt, response)
        except Exception as error:
            what = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"--judge {spec} failed on a response: {what}") from error
        if type(verdict).__name__ not in ("bool", "bool_"):  # a text that says "no" would count as yes
            raise UserError(f"--judge {spec} must return True or False, got {verdict!r}")
        return bool(verdict)

    return checked
