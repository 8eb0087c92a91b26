"""Counts to the expression a model reads: gene names, normalisation, panels.

Shape letters: N spots, G measured genes, P panel genes.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from st_align.errors import ConfigError, CorpusError, ModelError, StAlignError, require_file
from st_align.keys import UNLABELLED

if TYPE_CHECKING:
    from st_align.slide import PreparedSlide

TARGET_SUM = 1e4
SPIKE_IN = "ERCC-"
_SCORED_NICHES = 1024
_FOREIGN_SHARE = 0.05
"""Below this share of the panel, gene names written as another species' refuse the slide."""
_ENSEMBL = re.compile(r"^(ENS[A-Z]*G\d+)(\.\d+)?(_PAR_Y)?$")


@dataclass(frozen=True, kw_only=True)
class Genes:
    """Names of measured genes: unique `symbols` [G]; `ensembl` [G], '' where unknown."""

    symbols: NDArray[np.str_]
    ensembl: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.symbols)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The ordered genes a model reads; `ensembl` holds '' where the id is not known."""

    genes: tuple[str, ...]
    ensembl: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.genes)

    @property
    def hash(self) -> str:
        """12 hex digits that name the panel: equal hashes, equal genes in equal order."""
        return hashlib.sha256(self._text().encode()).hexdigest()[:12]

    def save(self, path: Path) -> None:
        """Write `genes.txt`: one gene a line, symbol and Ensembl id with a tab between."""
        path.write_text(self._text(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Panel:
        """Read the `genes.txt` of a run; missing or damaged: ModelError."""
        return _parse_panel(path, ModelError)

    def _text(self) -> str:
        return "".join(f"{g}\t{e}\n" for g, e in zip(self.genes, self.ensembl, strict=True))


@dataclass(frozen=True, kw_only=True)
class PanelExpression:
    """A slide's expression on a panel: log1p CP10k minus the slide's own mean per gene.

    0 always means "the slide's mean": genes the slide did not measure and spots without a
    library hold 0, so they vanish in linear maps.
    """

    values: NDArray[np.floating[Any]]
    """[N, P]: float32, or float16 memory-mapped where it comes from a corpus (equal values)."""
    measured: NDArray[np.bool_]
    """[P] genes of the panel that the slide measured."""
    valid: NDArray[np.bool_]
    """[N] spots whose library is not empty."""


def unify_genes(
    counts: Any, symbols: Iterable[Any], ensembl: Iterable[Any] | None = None
) -> tuple[sparse.csr_array, Genes, tuple[str, ...]]:
    """One column per gene symbol, in order of first appearance.

    Columns of one symbol are summed; Ensembl ids lose their version; a gene without a symbol
    goes by its Ensembl id, one without either is dropped.

    `counts` is CSR or dense [N, columns]; `symbols` [columns] may be Ensembl ids; None, NaN and
    '' mean unknown. Gives CSR [N, G] in canonical format, the genes, and warnings.
    """
    names = [_clean(name) for name in symbols]
    ids = [_clean(name) for name in ensembl] if ensembl is not None else [""] * len(names)
    if not len(names) == len(ids) == counts.shape[1]:
        raise ValueError(f"{counts.shape[1]} columns, {len(names)} symbols, {len(ids)} ids")
    versioned = 0
    for j, (name, identifier) in enumerate(zip(names, ids, strict=True)):
        short_name, short_id = _without_version(name), _without_version(identifier)
        versioned += (short_name, short_id) != (name, identifier)
        if not short_id and _ENSEMBL.match(short_name):
            short_id = short_name
        names[j], ids[j] = short_name or short_id, short_id

    column_of: dict[str, int] = {}
    gene_ids: list[str] = []
    for name, identifier in zip(names, ids, strict=True):
        if name and name not in column_of:
            column_of[name] = len(gene_ids)
            gene_ids.append(identifier)
        elif name and not gene_ids[column_of[name]]:
            gene_ids[column_of[name]] = identifier

    matrix = sparse.csr_array(counts)
    target = np.array([column_of.get(name, -1) for name in names], np.int64)
    dropped = int((target < 0).sum())
    merged = len(names) - dropped - len(column_of)
    if dropped or merged:
        kept = np.flatnonzero(target >= 0)
        ones = np.ones(len(kept), matrix.dtype)
        sums = sparse.csr_array((ones, (kept, target[kept])), shape=(len(names), len(column_of)))
        matrix = sparse.csr_array(matrix @ sums)
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    genes = Genes(symbols=np.array(list(column_of), np.str_), ensembl=np.array(gene_ids, np.str_))
    said = (
        (versioned, f"the version was cut from {versioned} Ensembl ids"),
        (merged, f"{merged} columns repeat the symbol of another and were added to it"),
        (dropped, f"{dropped} genes without a name were dropped"),
    )
    return matrix, genes, tuple(text for number, text in said if number)


def log_normalise(
    counts: Any, total_umi: NDArray[np.float64]
) -> tuple[sparse.csr_array, NDArray[np.bool_]]:
    """`ln(1 + count / (total_umi / 1e4))` as CSR float32 [N, genes], and `valid` [N].

    `total_umi` [N] is the library over all genes measured, not over the columns at hand. A spot
    whose library is empty is not valid and holds zeros.
    """
    valid = np.asarray(total_umi > 0)
    factor = np.divide(TARGET_SUM, total_umi, out=np.zeros(len(valid)), where=valid)
    matrix = sparse.csr_array(counts)
    scaled = matrix.data * np.repeat(factor, np.diff(matrix.indptr))
    data = np.log1p(scaled).astype(np.float32)
    return sparse.csr_array((data, matrix.indices, matrix.indptr), shape=matrix.shape), valid


def read_panel(path: Path) -> Panel:
    """A panel from a person's file: one gene a line, an Ensembl id after a tab or comma if known.

    Empty lines and lines that begin with # are skipped; anything else wrong is a ConfigError.
    """
    return _parse_panel(path, ConfigError)


def panel_columns(genes: Genes, panel: Panel) -> NDArray[np.intp]:
    """[P] column of each panel gene among `genes`, -1 where it was not measured.

    Symbols decide; where a symbol is unknown the Ensembl id does (symbols change between
    annotation releases).
    """
    columns: NDArray[np.intp] = pd.Index(genes.symbols).get_indexer(pd.Index(panel.genes))
    known = np.flatnonzero(genes.ensembl != "")
    ids = pd.Index(genes.ensembl[known])
    first = ~ids.duplicated()
    by_id = ids[first].get_indexer(pd.Index(panel.ensembl))
    found = (columns < 0) & (by_id >= 0) & (np.array(panel.ensembl, np.str_) != "")
    columns[found] = known[first][by_id[found]]
    return columns


def panel_expression(slide: PreparedSlide, panel: Panel) -> PanelExpression:
    """The slide on the panel's genes: log1p CP10k, centred per gene over its valid spots.

    Values are rounded to what float16 holds, so that a slide read from its source and the same
    slide read from a corpus's cache agree bit for bit. A slide without counts gives zeros with
    nothing measured and nothing valid.

    Counts with none of the panel's genes are a ModelError, and so are those with next to none
    whose gene names are those of another species: a few symbols coincide by chance.
    """
    n_spots, n_genes = slide.n_spots, len(panel)
    values = np.zeros((n_spots, n_genes), np.float32)
    if slide.genes is None or slide.counts is None:
        nothing = np.zeros(n_genes, np.bool_), np.zeros(n_spots, np.bool_)
        return PanelExpression(values=values, measured=nothing[0], valid=nothing[1])
    columns = panel_columns(slide.genes, panel)
    measured = columns >= 0
    if measured.mean() < _FOREIGN_SHARE:
        _require_own_species(slide.id, slide.genes, panel, int(measured.sum()))
    expression, valid = log_normalise(slide.counts[:, columns[measured]], slide.total_umi)
    dense = expression.toarray()
    if valid.any():
        dense -= dense[valid].mean(axis=0, dtype=np.float64).astype(np.float32)
    dense[~valid] = 0
    values[:, measured] = dense.astype(np.float16)
    return PanelExpression(values=values, measured=measured, valid=valid)


def choose_panel(slides: Sequence[PreparedSlide], n: int) -> Panel:
    """The `n` genes that vary most over tissue, among those at least half of the slides measured.

    A gene's score on a slide is the variance of its niche mean (log1p CP10k averaged over a spot
    and its neighbours, eq. 2): what a gene owes to the place and not to the few molecules caught
    in one spot, and what a linear map of niches would keep. Scores are ranked within the slide,
    so that differences between slides choose nothing; a gene that a slide did not measure scores
    0 there. Ranks are averaged over the slides of a patient, then over patients, so that many
    slides of one donor do not outvote the others; ties go by name. Spike-ins (`ERCC-`) are left
    out; mitochondrial and ribosomal genes stay, because in tissue they follow structure. Fewer
    genes than `n`: all of them.

    No slide with counts, or no gene measured by half of them, is a CorpusError.
    """
    counted = [(s, s.genes) for s in slides if s.genes is not None and s.counts is not None]
    if not counted:
        raise CorpusError(
            "no slide has counts to choose a panel from", found=f"{len(slides)} slides without"
        )
    universe = _universe([genes for _, genes in counted])
    score, seen = np.zeros(len(universe)), np.zeros(len(universe), np.int64)
    slides_of = Counter(slide.patient for slide, _ in counted)
    for slide, genes in counted:
        columns = panel_columns(genes, universe)
        at = np.flatnonzero(columns >= 0)
        ranks = pd.Series(_niche_variance(slide)[columns[at]]).rank(pct=True).to_numpy()
        score[at] += ranks / slides_of[slide.patient]
        seen[at] += 1
    eligible = np.flatnonzero(2 * seen >= len(counted))
    if not len(eligible):
        raise CorpusError(
            "no gene is measured by at least half of the slides",
            found=f"{len(counted)} slides with {len(universe)} genes in all",
            fix="train on slides of one species with gene names of one kind",
        )
    # Rounded, so that sums in another order do not break ties differently.
    chosen = eligible[np.argsort(-np.round(score[eligible], 12), kind="stable")[:n]]
    return Panel(
        genes=tuple(universe.genes[i] for i in chosen),
        ensembl=tuple(universe.ensembl[i] for i in chosen),
    )


def _niche_variance(slide: PreparedSlide) -> NDArray[np.float64]:
    """[G] variance of the niche mean of log1p CP10k, over at most 1,024 niches spread evenly."""
    expression, valid = log_normalise(slide.counts, slide.total_umi)
    spec = "lattice" if "lattice" in slide.niches else min(slide.niches)
    members = slide.niches[spec].neighbors[slide.spread(_SCORED_NICHES)]
    present = (members >= 0) & valid[members]
    present, members = present[present.any(axis=1)], members[present.any(axis=1)]
    of, position = np.nonzero(present)
    weight = (1 / present.sum(axis=1))[of].astype(np.float32)
    shape = (len(members), slide.n_spots)
    means = sparse.csr_array((weight, (of, members[of, position])), shape=shape) @ expression
    n_genes, data = means.shape[1], means.data.astype(np.float64)
    first = np.bincount(means.indices, data, minlength=n_genes) / max(len(members), 1)
    second = np.bincount(means.indices, data**2, minlength=n_genes) / max(len(members), 1)
    return np.maximum(second - first**2, 0)


def _universe(measured: Sequence[Genes]) -> Panel:
    """All genes that slides measured, sorted by name; of several symbols with one Ensembl id the
    one most slides use, so that a renamed gene enters once.
    """
    symbol_of: dict[str, Counter[str]] = {}
    id_of: dict[str, str] = {}
    for genes in measured:
        for name, identifier in zip(genes.symbols.tolist(), genes.ensembl.tolist(), strict=True):
            id_of[name] = id_of.get(name) or identifier
            symbol_of.setdefault(identifier, Counter())[name] += 1
    symbol_of.pop("", None)

    def preferred(name: str) -> bool:
        uses = symbol_of.get(id_of[name])
        return uses is None or name == min(uses, key=lambda s: (s == id_of[name], -uses[s], s))

    names = [n for n in sorted(id_of) if not n.startswith(SPIKE_IN) and preferred(n)]
    return Panel(genes=tuple(names), ensembl=tuple(id_of[n] for n in names))


def _parse_panel(path: Path, error: type[StAlignError]) -> Panel:
    try:
        text = require_file(path, "the gene panel", error).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as broken:
        raise error(f"{path} is not a text file", expected="one gene a line") from broken
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    rows = [[part.strip() for part in re.split(r"[\t,]", line)] for line in lines]
    genes = [row[0] for row in rows]
    repeated = [gene for gene, times in Counter(genes).items() if times > 1]
    if not rows or repeated or "" in genes or max(map(len, rows)) > 2:
        problem = f"{repeated[0]} is repeated" if repeated else f"{len(rows)} lines, not all genes"
        raise error(
            f"{path} is not a gene panel",
            expected="one gene a line, each once, an Ensembl id after a tab or comma if known",
            found=problem if rows else "no gene",
        )
    return Panel(genes=tuple(genes), ensembl=tuple(row[1] if row[1:] else "" for row in rows))


def _require_own_species(slide_id: str, genes: Genes, panel: Panel, shared: int) -> None:
    """Refuse a slide that shares no gene with the panel, or few and names genes as mouse does
    (Gapdh) where the panel names them as human does (GAPDH), or the reverse.
    """

    def mostly_title_case(names: Sequence[str]) -> bool:
        return sum(bool(re.match(r"[A-Z][a-z]", name)) for name in names) > len(names) / 2

    symbols = genes.symbols.tolist()
    looks = mostly_title_case(symbols)
    foreign = looks != mostly_title_case(panel.genes)
    if shared and not foreign:
        return
    slide_s, model_s = ("mouse", "human") if looks else ("human", "mouse")
    fix = (
        f"the slide's gene names look like {slide_s}, the model's like {model_s}: give their "
        f"{model_s} orthologues with --gene-map CSV, or use a model trained on {slide_s}"
    )
    raise ModelError(
        f"slide {slide_id!r} has {shared or 'none'} of the {len(panel)} genes of the model's panel",
        expected=f"gene symbols such as {', '.join(panel.genes[:3])}",
        found=f"{len(genes)} genes such as {', '.join(symbols[:3])}",
        fix=fix if foreign else "give gene symbols, or Ensembl ids of the same species",
    )


def _clean(name: Any) -> str:
    text = "" if name is None else str(name).strip()
    return "" if text.lower() in UNLABELLED else text


def _without_version(name: str) -> str:
    match = _ENSEMBL.match(name)
    return match[1] + (match[3] or "") if match else name
