"""`st-align view`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from st_align.commands.output import require_suffix
from st_align.errors import ConfigError
from st_align.view import build_view


def view_file(
    path: Path, out: Path, *, genes: str | None = None, label_key: str | None = None
) -> dict[str, Any]:
    """`st-align view`: the interactive page of one .h5ad file."""
    require_suffix(out, ".html")
    if path.suffix != ".h5ad":
        raise ConfigError(f"{path} is not an .h5ad file", fix="give what st-align embed wrote")
    wanted = None if genes is None else [g for name in genes.split(",") if (g := name.strip())]
    if wanted == []:
        raise ConfigError("--genes names no gene", expected="symbols, such as MOBP,SNAP25")
    result = build_view(path, out, genes=wanted, label_key=label_key)
    size = out.stat().st_size / 1e6
    print(f"view: {out} ({result['n_spots']:,} spots, {len(result['genes'])} genes, {size:.1f} MB)")
    return result
