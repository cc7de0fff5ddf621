"""`lfu probe KIND ...`: measure one thing about models, and write a record and a report of it."""

from __future__ import annotations

import argparse
import importlib
import shlex
from pathlib import Path

from lfu.cli import output
from lfu.cli.parser import LineParser
from lfu.support.errors import UserError, did_you_mean
from lfu.support.flags import at_least_one, not_negative

# kind -> what it measures; `lfu/cli/probes/<kind>.py` has `add_arguments(parser)` and `measure(given, command)`
PROBES = {
    "forgetting": "what a fine-tuned model gained and forgot, item by item",
    "drift": "how far weights and hidden states moved from the base model's",
    "prompts": "how much the wording of the prompt matters",
    "noise": "how steady the hidden states are under noisy input",
    "adversarial": "how easily a few harmful steps undo safety training",
}


def run(argv: list[str]) -> int:
    """Measures, writes record.json, index.html, report.md and pictures, and prints what was found.

    Raises:
        UserError: for anything the user can put right; nothing is written then.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    kind = argv[0]
    if kind == "sizes":
        raise UserError("lfu probe sizes is now lfu sweep --preset sizes: the same question, with the study's report")
    if kind not in PROBES:
        raise UserError(f"unknown probe {kind!r}: use one of {', '.join(PROBES)}.{did_you_mean(kind, PROBES)}")
    probe = importlib.import_module(f"lfu.cli.probes.{kind}")
    parser = LineParser(
        prog=f"lfu probe {kind}", description=probe.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    probe.add_arguments(parser)
    add_shared(parser, kind)
    given = parser.parse_args(argv[1:])
    out = Path(given.output_dir)
    output.check_writable(out)
    record = probe.measure(given, shlex.join(["lfu", "probe", *argv]))
    output.write_and_show(record, out, tables=0)
    return 0


def add_shared(parser: argparse.ArgumentParser, kind: str) -> None:
    """The flags that every probe has."""
    shared = parser.add_argument_group("all probes")
    shared.add_argument(
        "--output_dir", default=f"runs/probe-{kind}", metavar="DIR",
        help="folder for record and report; those of an earlier probe are replaced (default: %(default)s)",
    )  # fmt: skip
    shared.add_argument("--limit", type=at_least_one, metavar="N", help="use only the first N items")
    shared.add_argument(
        "--seed", type=not_negative, default=0, metavar="N", help="seed of everything random (default: 0)"
    )
    shared.add_argument(
        "--batch_size", type=at_least_one, default=8, metavar="N", help="items per forward pass (default: 8)"
    )
    shared.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float16", "float32"],
        help="load the weights as this type (default: float32 on a CPU, as stored on a GPU)",
    )  # fmt: skip
    shared.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")


def _help() -> str:
    kinds = "\n".join(f"  {kind:<13}{what}" for kind, what in PROBES.items())
    return f"""usage: lfu probe KIND ...

Measure one thing about models, and write a record and a report.

{kinds}

  lfu probe KIND --help shows more."""
