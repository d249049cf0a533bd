"""What `conserve` alone says: where to begin."""

from __future__ import annotations

from rich.text import Text

from conserve.cli.output import Output

STEPS = (
    ("conserve serve", "serve the small model that comes along; name one or a folder for another"),
    ("conserve top", "watch it: is chat safe, and what is harvested?"),
    ("conserve batch submit requests.jsonl", "give it offline work for the time in between"),
)
MORE = "conserve --help lists all commands; conserve serve --help=ConServe our flags of the server."


def show_beginning() -> None:
    console = Output(highlight=False, soft_wrap=True)
    console.print("Batch work in the idle time of an interactive LLM server. To begin:\n")
    for command, says in STEPS:
        console.print(Text.assemble("  ", (command, "bold"), f"\n      {says}"))
    console.print(f"\n{MORE}", markup=False)
