"""List the shipped recipes (files of flags for lfu train), or print one of them."""

from itertools import groupby

from lfu.recipes import FOLDER, find, launches, shipped
from lfu.support.flags import read_name
from lfu.support.words import filled

HEADINGS = {
    "models": "Models",
    "data": "Data sets",
    "variants": "Methods",
    "recipes": "Complete",
    "accelerate": "For accelerate launch --config_file (several GPUs)",
}


def run(argv: list[str]) -> int:
    """Prints the list, or one recipe's text."""
    name = read_name("lfu recipes", __doc__, "print this recipe", argv)
    print((launches().get(name) or find(name)).read_text(encoding="utf-8").rstrip() if name else _listing())
    return 0


def _listing() -> str:
    lines: list[str] = []
    for folder, group in groupby((shipped() | launches()).items(), key=lambda entry: entry[1].parent.name):
        lines += [f"{HEADINGS[folder]}:"]
        for name, path in group:
            first = path.read_text(encoding="utf-8").splitlines()[0]
            lines.append(filled(first.lstrip("# "), f"  {name:<27} ", " " * 30))
        lines.append("")
    lines += [
        "Use one or several: later ones win over earlier ones, and flags over them all.",
        "  lfu train --config smollm2",
        "  lfu train --config llama-3.1-8b,gsm8k,reps --output_dir runs/reps",
        f"A YAML file of your own can be given in place of a name. The shipped ones are in\n{FOLDER}",
    ]
    return "\n".join(lines)
