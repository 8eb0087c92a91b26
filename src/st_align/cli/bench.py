"""`st-align bench`: the family; each of its files of verbs adds to `bench_app`."""

from __future__ import annotations

import typer

from st_align.cli.app import app

bench_app = typer.Typer(
    help="The paper's tables and the honest ones, each by one command.", no_args_is_help=True
)
app.add_typer(bench_app, name="bench")
