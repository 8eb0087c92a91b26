"""Measured genes to the genes a pretrained encoder knows.

Three routes, each for what the ones before left over: the symbol itself; the Ensembl id, for
vocabularies that hold some (`ENSG00000283675.1`, `U6_ENSG00000283666`); HGNC's table, by which two
names belong to one human gene, be they its symbols of different years or its Ensembl id.

Shape letters: B spots, G measured genes, M of them found.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from st_align.errors import ModelError

if TYPE_CHECKING:
    from st_align.expression import Genes

_ENSEMBL = re.compile(r"(?:^|_)(ENSG\d{11})(?:\.\d+)?$")
_MOUSE = re.compile(r"[A-Z][a-z]")

Route = Callable[[str, str], int | None]


@dataclass(frozen=True, kw_only=True)
class GeneMatch:
    """Which measured genes an encoder knows, in the order of its vocabulary."""

    columns: NDArray[np.intp]
    """[M] columns of the counts."""
    tokens: NDArray[np.int64]
    """[M] their numbers in the vocabulary, ascending and each once."""
    by_symbol: int
    by_ensembl: int
    by_hgnc: int
    n_genes: int

    def select(self, counts: Any) -> sparse.csr_array:
        """Counts [B, G] -> CSR [B, M] without stored zeros, sorted by token."""
        found = sparse.csr_array(sparse.csr_array(counts)[:, self.columns])
        found.eliminate_zeros()
        found.sort_indices()
        return found

    def __str__(self) -> str:
        return (
            f"{len(self.tokens):,} of {self.n_genes:,} genes are in the vocabulary: "
            f"{self.by_symbol:,} by symbol, {self.by_ensembl:,} by Ensembl id, "
            f"{self.by_hgnc:,} by HGNC's table of former symbols and Ensembl ids"
        )


class GeneVocabulary:
    """The genes of an encoder: `tokens` maps a name to its number."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        self._by_ensembl: dict[str, int] = {}
        for name, token in tokens.items():
            if match := _ENSEMBL.search(name):
                self._by_ensembl.setdefault(match[1], token)
        self._by_gene = self._genes()
        self._last: tuple[Genes, GeneMatch] | None = None

    def match(self, genes: Genes) -> GeneMatch:
        """Find the measured genes. A token goes to one column: to that of the earlier route, then
        to the first. None found at all is a ModelError.
        """
        if self._last is None or self._last[0] is not genes:  # batch after batch of one slide
            self._last = genes, self._match(genes)
        return self._last[1]

    def _match(self, genes: Genes) -> GeneMatch:
        routes: Sequence[Route] = (
            lambda symbol, _: self._tokens.get(symbol),
            lambda _, ensembl: self._by_ensembl.get(ensembl),
            lambda symbol, ensembl: self._by_gene.get(_hgnc().gene(symbol, ensembl)),
        )
        names = list(zip(genes.symbols.tolist(), genes.ensembl.tolist(), strict=True))
        column_of: dict[int, int] = {}
        left, found = list(range(len(names))), []
        for route in routes:
            before, missed = len(column_of), []
            for column in left:
                token = route(*names[column])
                if token is None or token in column_of:
                    missed.append(column)
                else:
                    column_of[token] = column
            left = missed
            found.append(len(column_of) - before)
        if not column_of:
            raise _nothing_known(genes, self._tokens)
        tokens = sorted(column_of)
        return GeneMatch(
            columns=np.array([column_of[token] for token in tokens], np.intp),
            tokens=np.array(tokens, np.int64),
            by_symbol=found[0],
            by_ensembl=found[1],
            by_hgnc=found[2],
            n_genes=len(genes),
        )

    def _genes(self) -> dict[int | None, int]:
        """HGNC gene -> token; of several names of one gene the approved one."""
        by_gene: dict[int | None, int] = {}
        for name, token in self._tokens.items():
            gene = _hgnc().gene(name)
            if gene is not None and (gene not in by_gene or _hgnc().approved[gene] == name):
                by_gene[gene] = token
        return by_gene


@dataclass(frozen=True)
class _Hgnc:
    """HGNC's table. A gene is known by its row."""

    approved: list[str]
    by_ensembl: dict[str, int]
    by_symbol: dict[str, int]
    """Approved symbols, and those former ones that belonged to one gene only."""
    digest: str

    def gene(self, symbol: str, ensembl: str = "") -> int | None:
        """The Ensembl id decides where the table has it: symbols have changed hands."""
        gene = self.by_ensembl.get(ensembl)
        return self.by_symbol.get(symbol) if gene is None else gene


@cache
def _hgnc() -> _Hgnc:
    raw = resources.files("st_align.encoders").joinpath("hgnc.tsv.gz").read_bytes()
    lines = gzip.decompress(raw).decode().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    former: dict[str, list[int]] = {}
    for gene, (_, _, names) in enumerate(rows):
        for name in filter(None, names.split("|")):
            former.setdefault(name, []).append(gene)
    approved = [row[0] for row in rows]
    return _Hgnc(
        approved=approved,
        by_ensembl={row[1]: gene for gene, row in enumerate(rows) if row[1]},
        by_symbol={name: genes[0] for name, genes in former.items() if len(genes) == 1}
        | {name: gene for gene, name in enumerate(approved)},
        digest=hashlib.sha256(raw).hexdigest(),
    )


def table_digest() -> str:
    """Names the table's content, for fingerprints."""
    return _hgnc().digest


def _nothing_known(genes: Genes, tokens: Mapping[str, int]) -> ModelError:
    symbols = genes.symbols.tolist()
    mouse = sum(bool(_MOUSE.match(name)) for name in symbols) > len(symbols) / 2
    return ModelError(
        f"none of the slide's {len(genes):,} genes is in the encoder's vocabulary",
        expected=f"human gene symbols such as {', '.join(sorted(tokens)[:3])}, or Ensembl ids",
        found=", ".join(symbols[:3]),
        fix="its gene names look like mouse; the encoder knows human genes" if mouse else None,
    )
