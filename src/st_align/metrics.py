"""Scores of domains against labels; spots without a label leave the score only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align import keys
from st_align.domains import Domains
from st_align.errors import SlideError


def labelled(labels: Iterable[Any]) -> NDArray[np.bool_]:
    """[N] where there is a label: missing values, '', 'NA', 'nan' and 'None' are none."""
    return np.array([str(label).strip().lower() not in keys.UNLABELLED for label in labels])


def label_names(column: pd.Series) -> NDArray[np.str_]:
    """[N] labels of an obs column as text, `''` where there is none."""
    values = column.astype(object).to_numpy()
    names: NDArray[np.str_] = np.array([str(value) for value in values], np.str_)
    return np.where(labelled(values), names, "")


def ari(labels: NDArray[Any], found: NDArray[Any]) -> float:
    """Adjusted Rand index of `found` [N] against `labels` [N] on the labelled spots."""
    from sklearn.metrics import adjusted_rand_score

    true, guess = _scored(labels, found)
    return float(adjusted_rand_score(true, guess))


def nmi(labels: NDArray[Any], found: NDArray[Any]) -> float:
    """Normalised mutual information (arithmetic mean) on the labelled spots."""
    from sklearn.metrics import normalized_mutual_info_score

    true, guess = _scored(labels, found)
    return float(normalized_mutual_info_score(true, guess))


def score_domains(domains: Domains, labels: NDArray[Any]) -> dict[str, Any]:
    """Scores of all runs: `ari` and `nmi` of the labels in the form that is stored (smoothed or
    not), each with mean, std and runs; `ari_refined` and `ari_unrefined` are means over the runs,
    None where there is no lattice to smooth over.
    """
    aris = [ari(labels, run) for run in domains.runs]
    refined = domains.refined
    return {
        "ari": _summary(aris),
        "ari_stored": aris[domains.best],
        "ari_refined": None if refined is None else _mean(ari(labels, run) for run in refined),
        "ari_unrefined": _mean(ari(labels, run) for run in domains.unrefined),
        "nmi": _mean(nmi(labels, run) for run in domains.runs),
        "n_labelled": int(labelled(labels).sum()),
    }


def _scored(labels: NDArray[Any], found: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    if len(labels) != len(found):
        raise ValueError(f"{len(labels)} labels, {len(found)} spots")
    kept = labelled(labels)
    if not kept.any():
        raise SlideError("no spot has a label to score against", found=f"{len(labels)} unlabelled")
    return labels[kept].astype(str), found[kept]


def _summary(values: list[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "runs": values}


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
