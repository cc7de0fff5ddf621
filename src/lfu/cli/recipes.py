"""`lfu recipes`: list the shipped recipes; `lfu recipes NAME`: print one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from lfu.recipes import FOLDER, find, launches, shipped
from lfu.support.flags import argument, read

HEADINGS = {
    "models": "Models",
    "data": "Data sets",
    "variants": "Methods",
    "recipes": "Complete",
    "accelerate": "For accelerate launch --config_file (several GPUs)",
}


@dataclass
class Recipes:
    """What `lfu recipes` takes."""

    name: str | None = argument("NAME", "print this recipe", nargs="?")


def run(argv: list[str]) -> int:
    """Prints the list, or one recipe's text."""
    name = read(Recipes, "lfu recipes", __doc__, argv).name
    print((launches().get(name) or find(name)).read_text(encoding="utf-8").rstrip() if name else _listing())
    return 0


def _listing() -> str:
    lines: list[str] = []
    for folder, group in groupby((shipped() | launches()).items(), key=lambda entry: entry[1].parent.name):
        lines += [f"{HEADINGS[folder]}:"]
        for name, path in group:
            first = path.read_text(encoding="utf-8").splitlines()[0]
            lines.append(f"  {name:<24}{first.lstrip('# ')}")
        lines.append("")
    lines += [
        "Use a recipe, or several merged from left to right, later ones winning; flags win over all:",
        "  lfu train --config smollm2",
        "  lfu train --config llama-3.1-8b,gsm8k,reps --output_dir runs/reps",
        f"A path to a YAML file of your own works in place of a name. These lie in {FOLDER}",
    ]
    return "\n".join(lines)
