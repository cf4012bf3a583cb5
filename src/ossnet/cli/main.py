"""The command `ossnet`.

A command is one file: `cli/NAME.py` (dashes as underscores) with a function `command`, whose signature typer
reads and whose docstring is the help. It is listed here and imported only when it is called, so that
`ossnet --help` answers at once and torch is loaded by the commands that need it.
"""

import os
from importlib import import_module, metadata
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ossnet.cli.common import told

COMMANDS = {
    "check": "Look at a data set: what is in it, and what is wrong with it.",
    "train": "Train a network on a data set.",
    "segment": "Segment scans with a trained model.",
    "evaluate": "Compare segmentations with reference labels.",
    "pool": "Put the validation scores of several runs together, as of a cross-validation.",
    "mesh": "Write the surfaces of structures.",
    "import-weights": "Turn released OSS-Net weights into a model.",
    "info": "Show what a model is and how it was trained.",
    "demo": "Train, segment and evaluate on a real MRI in a few minutes.",
}
"""Name → one line of help, in the order in which people meet them."""


def _module(name: str) -> str:
    return f"ossnet.cli.{name.replace('-', '_')}"


class Commands(TyperGroup):
    """Lists commands without importing them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name, help=summary) for name, summary in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command itself, imported."""
        name, stub, rest = super().resolve_command(ctx, args)
        if name is None or stub is None:
            return name, stub, rest
        module = import_module(_module(name))
        single = typer.Typer(
            add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False
        )
        # The docstring's line breaks are for readers of the code; markdown joins them.
        single.command(name=name)(module.command)
        return name, typer.main.get_command(single), rest

    def invoke(self, ctx: Any) -> Any:
        """Run a command; errors become messages and exit codes."""
        with told():
            return super().invoke(ctx)


app = typer.Typer(
    name="ossnet",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"ossnet {metadata.version('ossnet')}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Segment 3D medical scans in function space: ask a network which structure is at any point.

    Start with `ossnet check DATA`, then `ossnet train --data DATA --out RUN` and
    `ossnet segment SCAN.nii.gz --model RUN --out RESULT`.
    """


def run() -> None:
    """Entry point of the installed command."""
    _spare_processors()
    app()


def _spare_processors() -> None:
    """Let threads that wait for each other sleep soon, where nobody chose otherwise.

    GNU's OpenMP, which torch for Linux uses, has them turn in circles for milliseconds otherwise. That gains a few
    percent when they are alone, and beside other work they burn what it computes with: a training on two cores took
    0.2 s a step, 4.7 s beside another program of ours, and 0.4 s so (`benchmarks/beside.py`). It is read when torch is
    loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
