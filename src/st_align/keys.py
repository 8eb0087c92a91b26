"""Every AnnData key this package reads or writes, once."""

from __future__ import annotations

from typing import Final

SPATIAL: Final = "spatial"
ARRAY_ROW: Final = "array_row"
ARRAY_COL: Final = "array_col"
TOTAL_UMI: Final = "total_umi"
PATIENT_COLUMNS: Final = ("subject", "patient", "donor")

EMBEDDING: Final = "X_stalign"
USES: Final = ("image", "gene", "spot", "niche", "spot+niche")
"""What a model learned; `spot+niche` is the concatenation of two."""
LINEAR_USES: Final = ("linear", "linear-scaled")
"""Niche expression on principal axes of the training slides, no network."""
TRAINING: Final = "stalign_training"
"""`uns`: by linear use, [M, R] spots of the model's training slides on the same axes."""
DOMAIN: Final = "stalign_domain"
PREDICTED: Final = "stalign_predicted"
LABEL: Final = "stalign_label"
"""Labels carried over."""
UNKNOWN: Final = "unknown"
"""The label of spots unlike all that were labelled."""
NICHE: Final = "stalign_niche"
"""`obsp[f"{NICHE}_connectivities"]`: who is in whose niche, as squidpy names its graphs."""
NORMALISED: Final = "stalign_log1p"
"""`layers`: log1p of counts per ten thousand."""
PATCHES: Final = "stalign_patches"
"""`obsm`: uint8 [N, p, p, 3] image of each spot."""
ATTENTION: Final = "stalign_attention"
"""`obsm` [N, T]: the share of a spot's attention that each image token gets from its genes."""
UNS: Final = "stalign"
UNLABELLED: Final = frozenset({"", "na", "nan", "none", "<na>"})
"""Labels that mean 'no label', lower case; they leave scores only."""


def probability(name: str) -> str:
    """The `obsm` key of an obs column's probabilities: a DataFrame, a column for each value."""
    return f"{name}_probability"


def connectivities(name: str) -> str:
    """The `obsp` key of a graph of spots."""
    return f"{name}_connectivities"


def embedding(use: str) -> str:
    """The `obsm` key of one embedding: `X_stalign_image`, `X_stalign_spot_niche`, ...; SpatialData
    takes letters, digits, `_`, `-` and `.` only.
    """
    return f"{EMBEDDING}_{use.replace('+', '_')}"
