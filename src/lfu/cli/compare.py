"""Which fine-tuning method is best for your model and your data? Trains with each method and several seeds, measures
what each one learned, forgot and cost, and writes a report that you can send to others. Finished runs are kept: the
same command continues where it was stopped.

Every other flag of lfu train applies to all runs (--learning_rate, --num_train_epochs, --use_peft, ...)."""

from dataclasses import dataclass
from typing import Any

from lfu.cli.study import Command, run_study
from lfu.study.options import WHAT
from lfu.support.errors import UserError
from lfu.support.flags import flag
from lfu.support.words import listed


def run(argv: list[str]) -> int:
    """Trains, measures, writes the report, and prints what was found."""
    return run_study("compare", Compare, argv, __doc__)


@dataclass(kw_only=True)
class Compare(Command):
    """The flags of `lfu compare`."""

    methods: list[str] = flag(
        WHAT, [], "methods of lfu train (see: lfu methods), with settings if you like: sft,lfu:alpha=0.01:lam=1; sft "
        "is added if it is missing; may be repeated", nargs="+", action="extend", metavar="M,M",
    )  # fmt: skip

    def settings(self, rates: list[str]) -> dict[str, Any]:
        """The settings that --methods names."""
        from lfu.study.settings import parse_setting

        texts = [text for words in self.methods for text in listed(words)]
        if not texts:
            raise UserError("no methods: give --methods sft,lfu,... (see: lfu methods), or a --preset")
        settings = [parse_setting(text) for text in texts]
        if twice := next((one.label for one in settings if settings.count(one) > 1), None):
            raise UserError(f"--methods names {twice!r} twice")
        return {"settings": settings}
