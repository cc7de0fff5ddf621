"""What is compared: settings, each a method with its knobs, and the plain SFT run that each is measured against."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache

from trl import ModelConfig, SFTConfig

from lfu import LfUConfig
from lfu.methods import method_class, methods_of
from lfu.methods.knobs import knobs_of
from lfu.methods.lfu import LfU
from lfu.methods.method import Method
from lfu.support.errors import UserError, did_you_mean, value_errors_are_the_users

YARDSTICK = "sft"
Pairs = tuple[tuple[str, str], ...]  # (name, value as text), in the order given

# The study decides these itself, alike for every run.
RESERVED = {
    "output_dir", "seed", "method", "data", "resume_from_checkpoint", "overwrite_output_dir", "report_to",
    "push_to_hub", "load_best_model_at_end", "disable_tqdm", "log_level", "run_name", "use_cpu", "streaming",
}  # fmt: skip
RESERVED_STARTS = ("eval_", "save_", "logging_", "do_", "hub_", "push_to", "fsdp", "deepspeed", "ddp_")

_ENTRY = re.compile(r":(?=[A-Za-z_][\w.]*=)")


@dataclass(frozen=True)
class Setting:
    """One way of fine-tuning."""

    method: str  # as `LfUConfig.method` takes it, `lfu+neftune` too
    own: Pairs = ()  # fields of `LfUConfig` that act on LfU alone
    knobs: Pairs = ()  # what goes into `method_args`
    shared: Pairs = ()  # training flags that are no part of the method, and `data_limit`: plain SFT has them, too

    @property
    def label(self) -> str:
        """The name in reports: `lfu alpha=0.01`."""
        alone = "+" not in self.method  # then a knob needs no method in front of its name
        knobs = [(name.partition(".")[2] if alone else name, value) for name, value in self.knobs]
        return " ".join([self.method, *(f"{name}={value}" for name, value in (*self.own, *knobs, *self.shared))])

    @property
    def yardstick(self) -> Setting:
        """Plain SFT with the same training flags."""
        return Setting(YARDSTICK, shared=self.shared)

    @property
    def values(self) -> dict[str, str]:
        """Everything that was set, by name."""
        return dict(self.own + self.knobs + self.shared)


def parse_setting(text: str) -> Setting:
    """`METHOD` or `METHOD:name=value:name=value`, as in `lfu:alpha=0.01:lam=5` or `gem+neftune:gem.beta=0.5`.

    Raises UserError: no such method, a name that is neither a knob of it nor a training flag, a value out of range.
    """
    method, *entries = _ENTRY.split(text.strip())
    return make_setting(method, {name: value for name, _, value in (entry.partition("=") for entry in entries)})


def make_setting(method: str, pairs: Mapping[str, str]) -> Setting:
    """A setting of `method`, each name sorted to where it belongs. Errors as `parse_setting`."""
    known = _knobs(method)
    own, knobs, shared = [], [], []
    for name, value in pairs.items():
        matching = [knob for knob in known if name in (knob, knob.rpartition(".")[2])]
        if name in lfu_fields() and is_lfu(method):
            own.append((name, value))
        elif len(matching) > 1:
            raise UserError(f"{method}: {name!r} could be {' or '.join(matching)}: say which")
        elif matching:
            knobs.append((matching[0], value))
        elif name in training_fields():
            shared.append((name, value))
        else:
            raise UserError(f"{method}: {_unknown(method, name, known)}")
    with value_errors_are_the_users():
        methods_of(method, dict(knobs))
    return Setting(method, tuple(own), tuple(knobs), tuple(shared))


def grid(method: str, params: Mapping[str, Sequence[str]]) -> list[Setting]:
    """Every combination of the parameters' values, the last parameter varying fastest. Errors as `parse_setting`."""
    return [make_setting(method, dict(zip(params, values))) for values in itertools.product(*params.values())]


def with_yardsticks(settings: Iterable[Setting]) -> list[Setting]:
    """All settings with their yardsticks, each once, yardsticks first."""
    given = list(settings)
    return list(dict.fromkeys([*(setting.yardstick for setting in given), *given]))


def is_lfu(method: str) -> bool:
    """Whether LfU is among the methods that `method` names. Raises UserError: no such method."""
    return any(issubclass(one, LfU) for one in classes_of(method).values())


@cache
def lfu_fields() -> frozenset[str]:
    """The fields of `LfUConfig` that only LfU reads."""
    return frozenset(_names(LfUConfig) - _names(SFTConfig) - {"method", "method_args", "blocks"})


def words_of(flags: Mapping[str, Sequence[str]], *, with_lfu: bool = False) -> list[str]:
    """The words of flags of `lfu train`, given by field; those that only LfU reads are left out unless it is there."""
    return [word for field, words in flags.items() if with_lfu or field not in lfu_fields() for word in words]


@cache
def training_fields() -> frozenset[str]:
    """The training flags that a setting may set: those of `lfu train` that the study leaves alone."""
    every = _names(SFTConfig) | _names(ModelConfig) | {"data_limit", "blocks"}  # KL, L1, GEM look for the blocks, too
    return frozenset(name for name in every if not is_reserved(name)) - {"model_name_or_path"}


def is_reserved(name: str) -> bool:
    """Whether the study sets this field of `lfu train` itself."""
    return name in RESERVED or name.startswith(RESERVED_STARTS)


def _names(config: type) -> set[str]:
    return {f.name for f in fields(config)}


def classes_of(method: str) -> dict[str, type[Method]]:
    """Name -> class of each method that `method` names; UserError if there is none."""
    with value_errors_are_the_users():
        return {name.strip(): method_class(name.strip()) for name in method.split("+")}


def _knobs(method: str) -> list[str]:
    """`gem.beta`, ... of all methods named."""
    return [f"{name}.{f.name}" for name, one in classes_of(method).items() for f in knobs_of(one)]


def _unknown(method: str, name: str, knobs: Sequence[str]) -> str:
    if is_reserved(name):
        return f"{name!r} is set by the study itself: leave it out"
    if name in lfu_fields():
        return f"{name!r} is LfU's own, and {method} has no LfU in it"
    mine = [*knobs, *(sorted(lfu_fields()) if is_lfu(method) else ())]
    listed = f"its settings are {', '.join(mine)}" if mine else "it has no settings of its own"
    close = did_you_mean(name, [*mine, *training_fields()])
    return f"unknown name {name!r}; {listed}, and every flag of lfu train is one, too.{close}"
