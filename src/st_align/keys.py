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
"""Embeddings that can be clustered; `spot+niche` is the concatenation of two."""
DOMAIN: Final = "stalign_domain"
PREDICTED: Final = "stalign_predicted"
UNS: Final = "stalign"
UNLABELLED: Final = frozenset({"", "na", "nan", "none", "<na>"})
"""Labels that mean 'no label', lower case; they leave scores only."""


def embedding(use: str) -> str:
    """The `obsm` key of one embedding: `X_stalign_image`, `X_stalign_spot`, ..."""
    return f"{EMBEDDING}_{use}"
