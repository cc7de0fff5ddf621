"""List the fine-tuning methods with source and cost, or show one of them."""

from lfu.methods import REGISTRY, unknown_method
from lfu.methods.about import About, about, measured
from lfu.support.errors import UserError
from lfu.support.flags import read_name
from lfu.support.words import filled


def run(argv: list[str]) -> int:
    """Prints the list, or one method."""
    name = read_name("lfu methods", __doc__, "show more about this method", argv)
    if name and name not in REGISTRY:
        raise UserError(unknown_method(name))
    if name:
        print(_one(about(name)))
    else:
        _print_table([about(name) for name in REGISTRY])
    return 0


def cost_of(name: str) -> str:
    """`1.90 / 1.88`: the time of a step over SFT's, for LoRA and full theta."""
    ratio = measured()["ratio"].get(name, {})
    return " / ".join(f"{ratio[theta]:.2f}" if ratio.get(theta) else "-" for theta in ("lora", "full"))


def _print_table(methods: list[About]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("method", "cost", "what it does", "source"):
        table.add_column(heading, no_wrap=heading in ("method", "cost"))
    for method in methods:
        table.add_row(method.name, cost_of(method.name), method.summary, method.source)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "\ncost: time of a training step over SFT's, LoRA / all weights; -: refused, or not measured. "
        f"{measured()['how']}\nMethods that act on different places combine: --method lfu+neftune, dft+kl.\n"
        "Their settings: --method_args gem.beta=0.5. More about one of them: lfu methods gem"
    )


def _one(method: About) -> str:
    from lfu.methods.method import PLACES

    places = "; ".join(f"{place} ({PLACES[place]})" for place in method.places) or "none"
    own = "the config's own: alpha, lam, auxiliary, ..." if method.places == ("step",) else "none"
    facts = {
        "source": method.source, "protects": method.protects, "acts on": places,
        "cost": f"{cost_of(method.name)} times SFT (LoRA / all weights). {measured()['how']}", "once": method.once,
        "settings": "for --method_args:" if method.knobs else own,
    }  # fmt: skip
    lines = [filled(text, f"{name:<10}", " " * 10) for name, text in facts.items() if text]
    lines += [
        filled(f"{method.name}.{name}={default}{limits and f' ({limits})'}: {help}", "  ", "    ")
        for name, default, limits, help in method.knobs
    ]
    return "\n".join([filled(f"{method.name}: {method.summary}\n\n{method.doc}"), "", *lines])
