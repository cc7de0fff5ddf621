"""`lfu recipes`: list the shipped recipes; `lfu recipes NAME`: print one."""

from __future__ import annotations

import argparse

from lfu.cli.parser import LineParser
from lfu.recipes import FOLDER, find, launches, shipped

HEADINGS = {
    "models": "Models",
    "data": "Data sets",
    "variants": "Methods",
    "recipes": "Complete",
    "accelerate": "For accelerate launch --config_file (several GPUs)",
}


def run(argv: list[str]) -> int:
    """Prints the list, or one recipe's text.

    Raises:
        UserError: if there is no recipe of that name.
    """
    parser = LineParser(prog="lfu recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="print this recipe")
    name = parser.parse_args(argv).name
    print(_text(name) if name else _listing())
    return 0


def _text(name: str) -> str:
    return (launches().get(name) or find(name)).read_text(encoding="utf-8").rstrip()


def _listing() -> str:
    lines: list[str] = []
    group = ""
    for name, path in (shipped() | launches()).items():
        if path.parent.name != group:
            group = path.parent.name
            lines += ["", HEADINGS[group] + ":"]
        first = path.read_text(encoding="utf-8").splitlines()[0]
        lines.append(f"  {name:<24}{first.lstrip('# ')}")
    lines += [
        "",
        "Use a recipe, or several merged from left to right, later ones winning; flags win over all:",
        "  lfu train --config smollm2",
        "  lfu train --config llama-3.1-8b,gsm8k,reps --output_dir runs/reps",
        f"A path to a YAML file of your own works in place of a name. These lie in {FOLDER}",
    ]
    return "\n".join(lines[1:])
