"""`lfu methods`: list the methods with source and cost; `lfu methods NAME`: show one."""

from __future__ import annotations

from lfu.cli.parser import LineParser
from lfu.methods import REGISTRY, unknown_method
from lfu.methods.about import About, about
from lfu.methods.costs import measured
from lfu.support.errors import UserError


def run(argv: list[str]) -> int:
    """Prints the list, or one method.

    Raises:
        UserError: if there is no method of that name.
    """
    parser = LineParser(prog="lfu methods", description=__doc__)
    parser.add_argument("name", nargs="?", help="show more about this method")
    name = parser.parse_args(argv).name
    if name and name not in REGISTRY:
        raise UserError(unknown_method(name))
    if name:
        print(_one(about(name)))
    else:
        _print_table([about(name) for name in REGISTRY])
    return 0


def cost_of(name: str, costs: dict) -> str:
    """`1.90 / 1.88 x SFT` for LoRA and full theta."""
    ratio = costs["ratio"].get(name, {})
    return " / ".join(f"{ratio[theta]:.2f}" if ratio.get(theta) else "-" for theta in ("lora", "full"))


def _print_table(methods: list[About]) -> None:
    from rich.console import Console
    from rich.table import Table

    costs = measured()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("method", "cost", "what it does", "source"):
        table.add_column(heading, no_wrap=heading in ("method", "cost"))
    for method in methods:
        table.add_row(method.name, cost_of(method.name, costs), method.summary, method.source)
    console = Console()
    console.print(table, highlight=False)
    console.print(
        f"\ncost: time of a training step over SFT's, LoRA / full theta; -: refused, or not measured. {costs['how']}\n"
        "Methods that act on different places combine: --method lfu+neftune, dft+kl.\n"
        "Knobs: --method_args gem.beta=0.5. More on one: lfu methods gem",
        highlight=False,
    )


def _one(method: About) -> str:
    from lfu.methods.method import PLACES

    costs = measured()
    places = "; ".join(f"{place} ({PLACES[place]})" for place in method.places) or "none"
    once = [f"once      {method.once}"] if method.once else []
    lines = [
        f"{method.name}: {method.summary}",
        "",
        method.doc,
        "",
        f"source    {method.source}",
        f"protects  {method.protects}",
        f"acts on   {places}",
        f"cost      {cost_of(method.name, costs)} x SFT (LoRA / full theta). {costs['how']}",
        *once,
    ]
    knobs = [f"  {method.name}.{name}={default}  {help}" for name, default, help in method.knobs]
    own = "the config's own: alpha, lam, auxiliary, ..." if method.places == ("step",) else "none"
    lines += ["knobs, for --method_args:", *knobs] if knobs else [f"knobs     {own}"]
    return "\n".join(lines)
