"""What h5ad files and SpatialData tables share: AnnData elements read one by one.

Only the elements that are needed are touched, so whatever else `uns` holds (pickles too) is
never decoded. `group` is an h5py or a zarr group, or an object in memory as `InMemory`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from st_align import keys
from st_align.errors import SlideError
from st_align.expression import Genes, unify_genes
from st_align.image import ImageSource
from st_align.inflation import require_plausible_arrays
from st_align.io.check import not_counts, raw_counts
from st_align.io.technology import from_barcodes, guess_technology
from st_align.slide import Slide, Technology

if TYPE_CHECKING:
    from anndata import AnnData

_SYMBOLS = ("gene_symbol", "gene_symbols", "gene_name", "gene_names", "feature_name", "symbol")
_ENSEMBL = ("gene_id", "gene_ids", "ensembl", "ensembl_id", "ensembl_ids", "feature_id")
_TOTALS = (keys.TOTAL_UMI, "nCount_RNA", "nCount_Spatial", "total_counts", "n_counts")
_PLACES = ((keys.ARRAY_ROW, keys.ARRAY_COL), ("row", "col"))
_COORDINATES = ("pxl_col_in_fullres", "pxl_row_in_fullres")
_WHOLE_TRANSCRIPTOME = 6000
"""Fewer genes than this are a selection, whose sums are no library sizes."""
_LAYERS = ("counts", "raw_counts")
_UNREADABLE = (OSError, KeyError, ValueError, TypeError, IndexError, RuntimeError, AttributeError)


@dataclass(frozen=True, kw_only=True)
class SpotTable:
    """The per-spot columns of an AnnData object, N spots."""

    barcodes: NDArray[np.str_]
    obs: pd.DataFrame
    xy: NDArray[np.float64]
    places: NDArray[np.int32] | None
    counts: sparse.csr_array | None
    genes: Genes | None
    total_umi: NDArray[np.float64] | None
    warnings: tuple[str, ...]

    def technology(self, given: Technology | None) -> tuple[Technology, tuple[str, ...]]:
        """The technology given, or that of the barcodes' form, or else the one that the pattern
        of the spots suggests, with a warning saying why.
        """
        if given is not None:
            return given, ()
        if told := from_barcodes(self.barcodes):
            return told[0], ()
        guess, reason = guess_technology(self.barcodes, self.places, self.xy)
        return guess, (f"technology taken to be {guess}: {reason}",)

    def slide(
        self, *, id: str, source: str, given: Technology | None, image: ImageSource | None
    ) -> Slide:
        """The slide of these spots, a patient of its own, not validated yet; `given` as for
        `technology`.
        """
        technology, reasons = self.technology(given)
        return Slide(
            id=id,
            technology=technology,
            source=source,
            barcodes=self.barcodes,
            xy=self.xy,
            places=self.places,
            counts=self.counts,
            genes=self.genes,
            total_umi=self.total_umi,
            image=image,
            obs=self.obs,
            patient=id,
            patient_origin="slide",
            warnings=(*self.warnings, *reasons),
        )


class InMemory:
    """An AnnData object asked as its file would be: by paths such as `obsm/spatial`."""

    def __init__(self, adata: AnnData) -> None:
        adata = adata.to_memory() if adata.isbacked else adata
        raw = adata.raw
        self._root: Mapping[str, Any] = {
            "obs": adata.obs,
            "var": adata.var,
            "obsm": adata.obsm,
            "layers": adata.layers,
            "uns": adata.uns,
            **({} if adata.X is None else {"X": adata.X}),
            **({} if raw is None else {"raw": {"X": raw.X, "var": raw.var}}),
        }

    def get(self, path: str, default: Any = None) -> Any:
        """What lies at `path`, `default` where nothing does."""
        found: Any = self._root
        for part in path.split("/"):
            if not hasattr(found, "keys") or part not in found:
                return default
            found = found[part]
        return found

    def __contains__(self, path: str) -> bool:
        return self.get(path) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._root)

    def __getitem__(self, path: str) -> Any:
        if path not in self:
            raise KeyError(path)
        return self.get(path)


def element(group: Any, path: str, what: str) -> Any:
    """Read one AnnData element, for instance `obsm/spatial`."""
    if isinstance(group, InMemory):
        return group[path]
    from anndata import OldFormatWarning
    from anndata.io import read_elem

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OldFormatWarning)  # old files are read, not updated
            require_plausible_arrays(group[path], f"{what}: {path}")
            return read_elem(group[path])
    except _UNREADABLE as error:
        raise SlideError(
            f"{what}: {path} cannot be read",
            expected="an AnnData element written by anndata >= 0.8",
            found=f"{type(error).__name__}: {error}",
            fix="read and write the file again with a recent anndata",
        ) from error


def read_obs(group: Any, what: str) -> pd.DataFrame:
    """The obs of an AnnData group, indexed by barcode."""
    missing = [name for name in ("obs", "var") if name not in group]
    if missing:
        raise SlideError(
            f"{what} is not an AnnData object",
            expected="obs, var and X",
            found=", ".join(sorted(group)) or "nothing",
        )
    obs = element(group, "obs", what)
    if not isinstance(obs, pd.DataFrame):
        raise SlideError(f"{what}: obs is not a table", found=type(obs).__name__)
    return obs.set_axis(obs.index.astype(str), axis=0)


def read_spots(
    group: Any,
    what: str,
    obs: pd.DataFrame,
    kept: NDArray[np.bool_],
    xy: NDArray[np.float64] | None = None,
) -> SpotTable:
    """Read the rows `kept` [N of all] of an AnnData group; spots off the tissue are left out.

    `xy` [all, 2] is given where the coordinates lie outside the group.
    """
    notes: list[str] = []
    if "in_tissue" in obs:
        off = kept & (pd.to_numeric(obs["in_tissue"], errors="coerce").to_numpy() == 0)
        if off.any():
            notes.append(f"{int(off.sum())} spots are off the tissue: left out")
            kept = kept & ~off
    rows = np.flatnonzero(kept)
    xy = (_coordinates(group, obs, what) if xy is None else xy)[rows]
    counts, genes, total = _expression(group, what, obs, rows, notes)
    obs = obs.iloc[rows]
    return SpotTable(
        barcodes=obs.index.to_numpy(str),
        obs=obs,
        xy=xy,
        places=_places(obs, notes),
        counts=counts,
        genes=genes,
        total_umi=total,
        warnings=tuple(notes),
    )


def _coordinates(group: Any, obs: pd.DataFrame, what: str) -> NDArray[np.float64]:
    """[N, 2] x, y of all spots."""
    obsm = group.get("obsm", {})
    if keys.SPATIAL in obsm:
        xy = np.asarray(element(group, f"obsm/{keys.SPATIAL}", what))
    elif set(_COORDINATES) <= set(obs):
        xy = obs[list(_COORDINATES)].to_numpy()
    else:
        raise SlideError(
            f"{what} has no coordinates",
            expected=f"obsm['{keys.SPATIAL}'] [N, 2], x and y in full-resolution pixels",
            found=f"obsm: {', '.join(obsm) or 'empty'}",
        )
    if xy.shape != (len(obs), 2) or xy.dtype.kind not in "iuf":
        raise SlideError(
            f"{what}: obsm['{keys.SPATIAL}'] holds no coordinates",
            expected=f"numbers [{len(obs)}, 2], x and y in full-resolution pixels",
            found=f"{xy.dtype} {list(xy.shape)}",
        )
    return xy.astype(np.float64)


def _places(obs: pd.DataFrame, notes: list[str]) -> NDArray[np.int32] | None:
    for names in _PLACES:
        if not set(names) <= set(obs):
            continue
        values = obs[list(names)].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
        whole = ((np.abs(values) < 1 << 31) & (values == np.floor(values))).all()
        if whole and (names == _PLACES[0] or len(np.unique(values, axis=0)) == len(values)):
            return np.asarray(values, np.int32)
        notes.append(f"obs {names[0]} and {names[1]} are no places: left out")
    return None


def _expression(
    group: Any, what: str, all_obs: pd.DataFrame, rows: NDArray[np.intp], notes: list[str]
) -> tuple[sparse.csr_array | None, Genes | None, NDArray[np.float64] | None]:
    """Raw counts of the rows, their genes and library sizes; Nones without a matrix."""
    name, matrix, var = raw_matrix(group, what)
    if matrix is None or matrix.shape[1] == 0:
        return None, None, None
    n_spots = len(all_obs)
    if matrix.shape != (n_spots, len(var)):
        raise SlideError(
            f"{what}: {name} does not fit obs and var",
            expected=f"{n_spots} spots x {len(var)} genes",
            found=f"a matrix of {matrix.shape[0]} x {matrix.shape[1]}",
        )
    if name != "X":
        notes.append(f"X does not hold raw counts: those of {name} are read")
    counts = raw_counts(matrix[rows], f"{what}: {name}")
    sums = np.asarray(counts.sum(axis=1), np.float64)
    total = library_sizes(all_obs.iloc[rows], sums, len(var), notes)
    symbols, ensembl = gene_names(var, notes)
    counts, genes, merged = unify_genes(counts, symbols, ensembl)
    notes.extend(merged)
    return counts, genes, total


def raw_matrix(group: Any, what: str) -> tuple[str, sparse.csr_array | None, pd.DataFrame]:
    """The first of X, layers['counts'], raw that holds raw counts: its name, matrix, var."""
    problem = None
    for name, path, var in _candidates(group):
        matrix = _matrix(group, path, what)
        found = not_counts(matrix.data)
        if found is None:
            return name, matrix, element(group, var, what)
        problem = problem or f"{name} holds {found}"
    if problem is None:
        return "X", None, pd.DataFrame()
    raise SlideError(
        f"{what} does not hold raw counts",
        expected="whole numbers >= 0 in X, layers['counts'] or raw",
        found=problem,
        fix="give raw counts, neither normalised nor log-transformed",
    )


def _candidates(group: Any) -> Iterator[tuple[str, str, str]]:
    """(name, path of the matrix, path of its var)."""
    if "X" in group:
        yield "X", "X", "var"
    for layer in _LAYERS:
        if layer in group.get("layers", {}):
            yield f"layers[{layer!r}]", f"layers/{layer}", "var"
    if "X" in group.get("raw", {}):
        yield "raw", "raw/X", "raw/var"


def _matrix(group: Any, path: str, what: str) -> sparse.csr_array:
    """A stored matrix as CSR; a dense one is read in blocks of rows."""
    stored = group[path]
    if sparse.issparse(stored):
        return sparse.csr_array(stored)
    if not hasattr(stored, "dtype"):
        return sparse.csr_array(element(group, path, what))
    require_plausible_arrays(stored, f"{what}: {path}")
    blocks = [sparse.csr_array(stored[i : i + 512]) for i in range(0, stored.shape[0], 512)]
    return sparse.vstack(blocks, format="csr") if blocks else sparse.csr_array(stored.shape)


def library_sizes(
    obs: pd.DataFrame, sums: NDArray[np.float64], n_genes: int, notes: list[str]
) -> NDArray[np.float64]:
    """The library size that obs states when it can be one, else the sums over the genes."""
    for column in _TOTALS:
        if column in obs:
            total = pd.to_numeric(obs[column], errors="coerce").to_numpy(np.float64)
            if np.isfinite(total).all() and (total >= sums).all():
                return np.asarray(total)
            notes.append(f"obs['{column}'] is smaller than the counts in places: left out")
    if n_genes < _WHOLE_TRANSCRIPTOME:
        notes.append(f"library sizes are sums over {n_genes} genes: no obs['{keys.TOTAL_UMI}']")
    return sums


def gene_names(var: pd.DataFrame, notes: list[str]) -> tuple[list[Any], list[Any] | None]:
    """Symbols and Ensembl ids of the columns."""
    index = list(var.index.astype(str))
    named = {str(column).lower(): column for column in reversed(var.columns)}
    symbols = next((list(var[named[c]].astype(object)) for c in _SYMBOLS if c in named), index)
    is_ensembl = sum(name.startswith("ENS") for name in index) > len(index) / 2
    if is_ensembl:
        if symbols is index:
            notes.append("var has no column of gene symbols: genes go by their Ensembl ids")
        return symbols, index
    return symbols, next((list(var[named[c]].astype(object)) for c in _ENSEMBL if c in named), None)
