"""What spots can be coloured by in the view: groups, and genes measured, predicted, and between.

Shape letters: N spots. Values travel as 16-bit steps of their range, a quarter of float64 and
finer than any screen shows.
"""

from __future__ import annotations

import base64
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from st_align import figures, keys, shown
from st_align.errors import SlideError
from st_align.expression import log_normalise
from st_align.io.anndata_table import gene_names
from st_align.io.check import not_counts

if TYPE_CHECKING:
    from anndata import AnnData

MAX_PREDICTED = 100
"""Predicted genes shown unless genes are named: more would make the page slow to open."""
TOP_VARIABLE = 20
MAX_GROUPS = 40
"""A column with more values than this names spots, it does not group them."""
MISSING = 65535
"""Stands for no value among the 16-bit steps 0 to 65534."""
_CP10K = "log1p of counts per 10,000"
_STEPS = 256


@dataclass(frozen=True, kw_only=True)
class GeneLayers:
    """Genes as the page reads them, the colour ramps, the unit, and how genes were chosen."""

    genes: list[dict[str, Any]]
    ramps: dict[str, list[str]]
    unit: str
    choice: str


def group_layers(obs: pd.DataFrame, label_key: str | None) -> list[dict[str, Any]]:
    """Domains, the labels, then every other column that sorts spots into 2 to 40 groups.

    Domains, and labels carried over, take the colours of the labels that they overlap most.
    """
    labels = shown.groups(obs, label_key) if label_key else None
    layers = []
    if keys.DOMAIN in obs:
        layers.append(_group_layer("Domains", shown.groups(obs, keys.DOMAIN), labels))
    named = [label_key] if label_key else []
    for key in [*named, *(str(c) for c in obs if _groups_spots(obs[c]))]:
        if key != keys.DOMAIN and all(key != layer["title"] for layer in layers):
            same = labels if key == keys.LABEL else None
            layers.append(_group_layer(key, shown.groups(obs, key), same))
    return layers


def _groups_spots(column: pd.Series) -> bool:
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    return not numeric and 2 <= column.nunique() <= MAX_GROUPS


def _group_layer(title: str, groups: list[str], reference: list[str] | None) -> dict[str, Any]:
    colors = figures.matched_colors(groups, reference)
    code = {name: i for i, name in enumerate(colors)}
    codes = np.array([code.get(name, MISSING) for name in groups], np.uint16)
    return {
        "title": title,
        "names": list(colors),
        "colors": list(colors.values()),
        "counts": [int((codes == i).sum()) for i in code.values()],
        "none": int((codes == MISSING).sum()),
        "codes": _encoded(codes),
    }


def gene_layers(adata: AnnData, wanted: Sequence[str] | None) -> GeneLayers:
    """The genes asked for, else the predicted and the most variable ones.

    Raises:
        SlideError: a gene asked for is neither measured nor predicted.

    """
    predicted = shown.predicted(adata)
    predicted.columns = predicted.columns.astype(str)
    matrix, unit = _expression(adata)
    symbols, _ = gene_names(adata.var, [])
    names = [str(name) for name in symbols]
    column = {name: i for i, name in reversed(list(enumerate(names)))}
    genes, choice = _chosen(matrix, names, list(predicted.columns), wanted)
    layers = []
    for gene in genes:
        measured = _column(matrix, column[gene]) if gene in column else None
        guess = predicted[gene].to_numpy(np.float64) if gene in predicted else None
        layers.append(_gene_layer(gene, measured, guess, differ=unit == _CP10K))
    ramps = {"value": _ramp(figures.SEQUENTIAL), "difference": _ramp("RdBu_r")}
    return GeneLayers(genes=layers, ramps=ramps, unit=unit, choice=choice)


def _expression(adata: AnnData) -> tuple[sparse.csc_array, str]:
    """Every measured gene [N, genes] and its unit: raw counts are normalised, others left as they
    are. NaN in the rows of spots without counts.
    """
    stored = sparse.csr_array(adata.X if adata.X is not None else adata.shape)
    if not_counts(stored.data) is not None:
        return sparse.csc_array(stored, dtype=np.float64), "as stored in X"
    sums = np.asarray(stored.sum(axis=1), np.float64)
    total = sums
    if keys.TOTAL_UMI in adata.obs:
        given = pd.to_numeric(adata.obs[keys.TOTAL_UMI], errors="coerce").to_numpy(np.float64)
        total = np.where(np.isfinite(given), given, sums)
    return sparse.csc_array(log_normalise(stored, total)[0]), _CP10K


def _chosen(
    matrix: sparse.csc_array, names: list[str], predicted: list[str], wanted: Sequence[str] | None
) -> tuple[list[str], str]:
    """Genes to show, and the sentence that says how they were chosen."""
    if wanted is not None:
        known = {*names, *predicted}
        for gene in wanted:
            if gene not in known:
                close = difflib.get_close_matches(gene, known, n=3, cutoff=0.7)
                raise SlideError(
                    f"there is no gene {gene!r}",
                    expected="genes that were measured or predicted",
                    found=f"{len(names)} measured, {len(predicted)} predicted",
                    fix=f"similar ones: {', '.join(close)}" if close else "check the symbol",
                )
        return list(dict.fromkeys(wanted)), ""
    kept = predicted[:MAX_PREDICTED]
    top = [names[i] for i in _most_variable(matrix, TOP_VARIABLE)]
    said = [f"{len(kept)} predicted"] if kept else []
    if len(kept) < len(predicted):
        said[0] = f"the first {len(kept)} of {len(predicted)} predicted"
    said += [f"the {len(top)} most variable"] if top else []
    return list(dict.fromkeys([*kept, *top])), " and ".join(said)


def _most_variable(matrix: sparse.csc_array, n: int) -> list[int]:
    """Columns of the highest variance over spots, ties in their order; none that is constant."""
    if 0 in matrix.shape:
        return []
    mean = np.asarray(matrix.mean(axis=0))
    variance = np.asarray((matrix**2).mean(axis=0)) - mean**2
    order = np.argsort(-np.nan_to_num(variance), kind="stable")[:n]
    return [int(i) for i in order if variance[i] > 1e-12]


def _column(matrix: sparse.csc_array, index: int) -> NDArray[np.float64]:
    return np.asarray(matrix[:, [index]].toarray(), np.float64).ravel()


def _gene_layer(
    name: str,
    measured: NDArray[np.float64] | None,
    predicted: NDArray[np.float64] | None,
    *,
    differ: bool,
) -> dict[str, Any]:
    """One gene; measured and predicted share a scale where they share a unit."""
    parts = {"measured": measured, "predicted": predicted}
    both = measured is not None and predicted is not None and differ
    scales = {kind: _range([v]) for kind, v in parts.items() if v is not None}
    if both:
        scales = dict.fromkeys(scales, _range(v for v in parts.values() if v is not None))
    layer: dict[str, Any] = {"name": name, "scales": scales}
    layer |= {kind: None if v is None else _steps(v) for kind, v in parts.items()}
    if both and measured is not None and predicted is not None:
        layer["scales"]["difference"] = _symmetric(predicted - measured)
    return layer


def _range(values: Iterable[NDArray[np.float64]]) -> list[float]:
    """First and 99th percentile: one bright spot does not flatten the rest."""
    every = np.concatenate(list(values))
    every = every[np.isfinite(every)]
    if not every.size:
        return [0.0, 1.0]
    low, high = (float(v) for v in np.percentile(every, [1, 99]))
    if high <= low:
        low, high = float(every.min()), float(every.max())
    return [low, high if high > low else low + 1.0]


def _symmetric(difference: NDArray[np.float64]) -> list[float]:
    size = np.abs(difference[np.isfinite(difference)])
    bound = float(np.percentile(size, 99)) if size.size else 0.0
    return [-bound, bound] if bound > 0 else [-1.0, 1.0]


def _steps(values: NDArray[np.float64]) -> dict[str, Any]:
    finite = np.isfinite(values)
    low = float(values[finite].min()) if finite.any() else 0.0
    span = (float(values[finite].max()) - low if finite.any() else 0.0) or 1.0
    scaled = np.where(finite, (np.where(finite, values, low) - low) / span, 0)
    steps = np.where(finite, np.rint(scaled * (MISSING - 1)), MISSING).astype(np.uint16)
    return {"low": low, "step": span / (MISSING - 1), "steps": _encoded(steps)}


def _encoded(values: NDArray[np.uint16]) -> str:
    return base64.b64encode(values.astype("<u2").tobytes()).decode()


def _ramp(name: str) -> list[str]:
    from matplotlib import colormaps, colors

    return [colors.to_hex(colormaps[name](x)) for x in np.linspace(0, 1, _STEPS)]
