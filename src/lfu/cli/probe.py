"""`lfu probe KIND ...`: measure one thing about models, and write a record and a report of it."""

import importlib
import shlex
from pathlib import Path

from lfu.cli import output
from lfu.support.errors import UserError, did_you_mean
from lfu.support.flags import read

# kind -> what it measures; `lfu/cli/probes/<kind>.py` has the class of its name
PROBES = {
    "forgetting": "what a fine-tuned model gained and forgot, item by item",
    "drift": "how far weights and hidden states moved from the base model's",
    "prompts": "how much the wording of the prompt matters",
    "noise": "how steady the hidden states are under noisy input",
    "adversarial": "how easily a few harmful steps undo safety training",
}


def run(argv: list[str]) -> int:
    """Measures, writes record.json, index.html, report.md and pictures, and prints what was found."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    kind = argv[0]
    if kind not in PROBES:
        raise UserError(f"unknown probe {kind!r}: use one of {', '.join(PROBES)}.{did_you_mean(kind, PROBES)}")
    module = importlib.import_module(f"lfu.cli.probes.{kind}")
    probe = read(getattr(module, kind.capitalize()), f"lfu probe {kind}", module.__doc__, argv[1:])
    out = Path(probe.output_dir or f"runs/probe-{kind}")
    output.check_writable(out)
    output.write_and_show(probe.record(shlex.join(["lfu", "probe", *argv])), out, tables=0)
    return 0


def _help() -> str:
    kinds = "\n".join(f"  {kind:<13}{what}" for kind, what in PROBES.items())
    return f"""usage: lfu probe KIND ...

Measure one thing about models, and write a record and a report.

{kinds}

  lfu probe KIND --help shows more."""
