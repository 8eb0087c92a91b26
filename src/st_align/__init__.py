"""ST-Align: spot-niche pretraining of image and genes for spatial transcriptomics.

    import st_align as sta

    adata = sta.io.read("my_visium_folder")
    sta.tl.embed(adata, model="run")
    sta.tl.domains(adata, n_domains=7)
    sta.pl.domains(adata)

`pp`, `tl`, `pl`, `io`, `datasets` and `STAlign` are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st_align import datasets as datasets
    from st_align import io as io
    from st_align import pl as pl
    from st_align import pp as pp
    from st_align import tl as tl
    from st_align.trained import STAlign as STAlign

__version__ = "0.1.0"
__all__ = ["STAlign", "__version__", "datasets", "io", "pl", "pp", "tl"]


def __getattr__(name: str) -> Any:
    if name == "STAlign":
        return importlib.import_module("st_align.trained").STAlign
    if name in __all__:
        return importlib.import_module(f"st_align.{name}")
    raise AttributeError(f"module 'st_align' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
