"""An embedded slide as AnnData, readable as a slide again.

Shape letters: N spots.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align import __version__, keys, store
from st_align.checkpoint import Run
from st_align.config import Use
from st_align.infer import SlideEmbeddings, run_hash, training_slides
from st_align.mosaic import mosaic
from st_align.provenance import licences
from st_align.slide import SPOT_UM, PreparedSlide

if TYPE_CHECKING:
    from anndata import AnnData

Thumbnail = tuple[NDArray[np.uint8], float]
"""RGB [h, w, 3] and its px per full-resolution px, as `ImageSource.thumbnail` gives it."""

_OWN_PREFIX = "stalign_"


def to_anndata(
    run: Run,
    slide: PreparedSlide,
    embeddings: SlideEmbeddings,
    *,
    thumbnail: Thumbnail | None = None,
) -> AnnData:
    """The slide as AnnData with the keys of `keys.py`; it is readable as a slide again.

    X holds raw counts; `obsm['X_stalign']` the run's default use and dimensions (the first use
    the slide can fill where that one is absent), `X_stalign_USE` all axes of every use and of the
    linear ones; `obs` the source's columns; `uns['spatial']` the `thumbnail`, by default stitched
    from the niches' patches; `uns['stalign']` where all of it comes from.
    """
    import anndata

    use, dims = _default_use(run, embeddings), run.config.readout.dims
    obs = _obs(slide)
    adata = anndata.AnnData(
        X=None if slide.counts is None else _csr(slide.counts),
        obs=obs,
        var=None if slide.genes is None else _var(slide),
        shape=(slide.n_spots, 0) if slide.counts is None else None,
    )
    adata.obsm[keys.SPATIAL] = slide.spots[["x", "y"]].to_numpy(np.float64)
    for name, values in embeddings.readouts.items():
        adata.obsm[keys.embedding(name)] = values
    for kind, values in embeddings.linear.items():
        adata.obsm[keys.embedding(kind)] = values
    adata.uns[keys.TRAINING] = dict(embeddings.training)
    adata.obsm[keys.EMBEDDING] = embeddings.readouts[use][:, :dims]
    if slide.has_image and slide.um_per_px is not None:
        image, scale = thumbnail or mosaic(slide.niches[run.config.data.niche])
        factors = {
            "tissue_hires_scalef": float(scale),
            "spot_diameter_fullres": SPOT_UM[slide.technology] / slide.um_per_px,
        }
        adata.uns[keys.SPATIAL] = {slide.id: {"images": {"hires": image}, "scalefactors": factors}}
    if slide.licence:
        adata.uns["licence"] = slide.licence
    store.note(adata, **_notes(run, slide, embeddings, use))
    return adata


def _notes(run: Run, slide: PreparedSlide, embeddings: SlideEmbeddings, use: Use) -> dict[str, Any]:
    facts = ("technology", "patient", "patient_origin", "tissue", "species", "um_per_px")
    provenance = {k: v for k, v in run.provenance.items() if k not in ("slides", "held_out")}
    return {
        "version": __version__,
        "slide": slide.id,
        "source": Path(slide.source).name,
        **{name: getattr(slide, name) for name in facts},
        "model": run.path.resolve().name,
        "model_hash": run_hash(run),
        "use": use,
        "dims": min(run.config.readout.dims, embeddings.readouts[use].shape[1]),
        "niche": run.config.data.niche,
        "panel_size": len(run.panel),
        "panel_measured": round(embeddings.panel_measured, 4),
        "variance_on_training_axes": embeddings.shares,
        "n_masked": 0 if slide.counts is None else int((~(slide.total_umi > 0)).sum()),
        "trained_on": training_slides(run),
        "warnings": list(embeddings.warnings),
        "licences": licences(run.provenance, slide.licence),
        "provenance": provenance,
    }


def _default_use(run: Run, embeddings: SlideEmbeddings) -> Use:
    use = run.config.readout.use
    return use if use in embeddings.readouts else next(iter(embeddings.readouts))


def _obs(slide: PreparedSlide) -> pd.DataFrame:
    """The slide's columns by barcode, in types that h5ad holds; what this package wrote into
    the source before is left out, it may come from another model.
    """
    unused = {"barcode", "x", "y"}
    if (slide.spots[keys.ARRAY_ROW] < 0).all():
        unused |= {keys.ARRAY_ROW, keys.ARRAY_COL}
    if slide.counts is None:
        unused.add(keys.TOTAL_UMI)
    kept = [c for c in slide.spots if c not in unused and not str(c).startswith(_OWN_PREFIX)]
    barcodes = pd.Index(slide.spots["barcode"].astype(str).to_numpy(), dtype=object)
    obs = slide.spots[kept].set_axis(barcodes, axis=0)
    if slide.patient_origin in ("table", "study") and not set(keys.PATIENT_COLUMNS) & set(obs):
        obs = obs.assign(patient=slide.patient)
    obs.columns = pd.Index(_h5ad_names([str(c) for c in obs]), dtype=object)
    for name in obs:
        if obs[name].dtype == object:
            known = obs[name].notna()
            obs[name] = pd.Categorical(obs[name].astype(str).where(known))
    return obs


def _h5ad_names(columns: Sequence[str]) -> list[str]:
    """Names without '/', which h5ad takes for a folder; of equal ones all but the first are
    numbered, and a column that needs no new name keeps its own.
    """
    names, taken = list(columns), set()
    for i in sorted(range(len(names)), key=lambda i: "/" in names[i]):
        name = plain = names[i].replace("/", "_")
        number = 1
        while name in taken:
            number += 1
            name = f"{plain}_{number}"
        names[i] = name
        taken.add(name)
    return names


def _var(slide: PreparedSlide) -> pd.DataFrame:
    genes = slide.genes
    if genes is None:
        raise ValueError("counts without genes")
    return pd.DataFrame(
        {"ensembl": genes.ensembl.astype(object)},
        index=pd.Index(genes.symbols.astype(object), dtype=object),
    )


def _csr(counts: Any) -> Any:
    from scipy import sparse

    return sparse.csr_matrix(counts)
