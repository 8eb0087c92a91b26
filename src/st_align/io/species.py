"""Genes of another species: refused, or renamed by a table of orthologues."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from st_align.errors import SlideError
from st_align.expression import unify_genes
from st_align.io.tables import read_table
from st_align.slide import Slide

_MOUSE_ID, _TITLE_CASE = re.compile(r"ENSMUSG\d+"), re.compile(r"[A-Z][a-z]")
_MARKS = ("from", "to")
_UNNAMED = 20
"""Fewer genes than this do not tell a species."""


def read_gene_map(path: Path) -> dict[str, str]:
    """`from` (symbol or Ensembl id) to `to` of a CSV; a gene named twice is a SlideError."""
    table = read_table(path, _MARKS, "gene map")
    table = table[list(_MARKS)].dropna().astype(str).drop_duplicates()
    twice = table["from"][table["from"].duplicated()]
    if len(twice):
        raise SlideError(
            f"gene map {path} gives two names to one gene",
            expected="one row for each gene in the column 'from'",
            found=f"{len(twice)} repeated, such as {twice.iloc[0]!r}",
            fix="keep one orthologue of each",
        )
    return dict(zip(table["from"], table["to"], strict=True))


def rename_genes(slide: Slide, names: dict[str, str], path: Path) -> Slide:
    """The slide with the genes that the map names, under their new names; columns that come to
    one name are added. Library sizes stay those of all genes. Nothing renamed is a SlideError.
    """
    genes, counts = slide.genes, slide.counts
    if genes is None or counts is None:
        return slide
    pairs = zip(genes.symbols.tolist(), genes.ensembl.tolist(), strict=True)
    new = [names.get(symbol) or names.get(identifier) for symbol, identifier in pairs]
    kept = np.flatnonzero([name is not None for name in new])
    if not len(kept):
        raise SlideError(
            f"gene map {path} names no gene of slide {slide.id!r}",
            expected="symbols or Ensembl ids of the slide in the column 'from'",
            found=f"{len(genes)} genes such as {', '.join(genes.symbols[:3].tolist())}",
        )
    sums = np.asarray(counts.sum(axis=1), np.float64)
    matrix, renamed, notes = unify_genes(counts[:, kept], [new[i] for i in kept])
    said = f"{len(kept)} of {len(genes)} genes renamed by {path.name}, the others left out"
    return replace(
        slide,
        counts=matrix,
        genes=renamed,
        total_umi=slide.total_umi if slide.total_umi is not None else sums,
        warnings=(*slide.warnings, said, *notes),
    )


def require_human(slide: Slide) -> Slide:
    """The slide, unless its genes are named as mouse's are (ENSMUSG..., Snap25): SlideError."""
    if slide.genes is None or len(slide.genes) < _UNNAMED:
        return slide
    symbols, ids = slide.genes.symbols.tolist(), slide.genes.ensembl.tolist()
    of_mouse = sum(bool(_MOUSE_ID.match(name)) for name in (*symbols, *ids))
    title = sum(bool(_TITLE_CASE.match(name)) for name in symbols)
    if max(of_mouse, title) <= len(symbols) / 2:
        return slide
    raise SlideError(
        f"the genes of slide {slide.id!r} are not human ones",
        expected="symbols such as SNAP25, or Ensembl ids ENSG...",
        found=f"genes such as {', '.join(symbols[:3])}",
        fix="give human orthologues with --gene-map CSV (columns from,to), or name the species "
        "with --species to make a corpus of it alone",
    )
