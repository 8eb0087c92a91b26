"""The Typer application that every file of verbs adds to."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="st-align",
    help="Spot-niche pretraining of image and genes for 10x Visium.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Spot-niche pretraining of image and genes for 10x Visium."""
    if version:
        from st_align import __version__

        print(f"st-align {__version__}")
        raise typer.Exit
