"""Slides from objects in memory: an AnnData, a dict of them, or a SpatialData; and back to AnnData.

An object is split into parts, one a slide: by library id, by region, by name.

Shape letters: N rows of a table, n spots of one slide.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from st_align import keys
from st_align.errors import ConfigError, SlideError, nearest
from st_align.image import ImageSource, open_image
from st_align.io.anndata_table import InMemory, read_obs, read_spots
from st_align.io.check import check_slide
from st_align.io.h5ad import libraries, library_rows, read_library
from st_align.io.patients import with_patient
from st_align.io.refs import ReadOptions
from st_align.io.spatialdata import finest_image, open_levels
from st_align.slide import SPOT_UM, Slide

if TYPE_CHECKING:
    from anndata import AnnData

LIBRARY: str = "library_id"
"""The obs column that splits a table without being asked to."""
_THUMBNAIL_PX = 2000
_REGION, _INSTANCE, _ATTRS = "region_key", "instance_key", "spatialdata_attrs"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One slide of an object: `rows` [n] of `table` are its spots."""

    id: str
    table: AnnData
    rows: NDArray[np.intp]
    read: Callable[[ReadOptions], Slide]

    def slide(self, options: ReadOptions | None = None) -> Slide:
        """The validated slide; spots off the tissue are not in it. Raises SlideError."""
        slide = replace(self.read(options or ReadOptions()), id=self.id, patient=self.id)
        return check_slide(with_patient(slide, None, study=False))

    def rows_of(self, barcodes: Sequence[str] | NDArray[np.str_]) -> NDArray[np.intp]:
        """Rows of the table that hold the spots `barcodes` of the slide."""
        names = pd.Index(self.table.obs_names[self.rows].astype(str))
        found: NDArray[np.intp] = names.get_indexer(pd.Index(np.asarray(barcodes, str)))
        return self.rows[found]


def parts_of(
    data: Any,
    *,
    library_key: str | None = None,
    table: str = "table",
    region: str | None = None,
    coordinates: ArrayLike | None = None,
) -> list[Part]:
    """The slides of an object, read only when they are asked for.

    Args:
        data: an AnnData (`uns["spatial"]` as squidpy and scanpy write it), a dict of them by
            slide, or a SpatialData.
        library_key: obs column that tells the slides of one AnnData apart; by default
            `library_id`, or the column that holds the names in `uns["spatial"]`.
        table: the table of a SpatialData.
        region: one region of it; by default all.
        coordinates: [N, 2] x and y in full-resolution pixels, of one AnnData without
            `obsm["spatial"]`.

    Raises:
        SlideError: the object is none of these, or holds no such slide.
        ConfigError: a key, table or region that is not there.

    """
    import anndata

    if isinstance(data, Mapping):
        if coordinates is not None:
            raise ConfigError("coordinates= goes with one AnnData", found=f"{len(data)} of them")
        found = [
            replace(part, id=str(name) if single else f"{name}_{part.id}")
            for name, item in data.items()
            for parts in [parts_of(item, library_key=library_key, table=table, region=region)]
            for single in [len(parts) == 1]
            for part in parts
        ]
        if not found:
            raise SlideError("there is no slide", expected="an AnnData by slide", found="{}")
        return found
    if isinstance(data, anndata.AnnData):
        return _anndata_parts(data, library_key, coordinates)
    if hasattr(data, "tables") and hasattr(data, "shapes"):
        return _spatialdata_parts(data, table, region)
    raise SlideError(
        "this is no slide",
        expected="an AnnData, a dict of them, or a SpatialData",
        found=type(data).__name__,
        fix="read it first: sta.io.read(PATH)",
    )


def to_anndata(slide: Slide) -> AnnData:
    """A slide as AnnData in squidpy's convention: raw counts, `obsm["spatial"]`, places and the
    source's columns in obs, the image (at most 2,000 px a side) in `uns["spatial"]`.
    """
    import anndata
    from scipy import sparse

    from st_align.geometry import fit_scale
    from st_align.slide import LATTICE, PITCH_UM

    obs = slide.obs.set_axis(pd.Index(slide.barcodes.astype(object)), axis=0).copy()
    if slide.places is not None:
        obs[keys.ARRAY_ROW], obs[keys.ARRAY_COL] = slide.places.T
    if slide.total_umi is not None:
        obs[keys.TOTAL_UMI] = slide.total_umi
    var = None
    if slide.genes is not None:
        var = pd.DataFrame(
            {"ensembl": slide.genes.ensembl.astype(object)},
            index=pd.Index(slide.genes.symbols.astype(object)),
        )
    adata = anndata.AnnData(
        X=None if slide.counts is None else sparse.csr_matrix(slide.counts),
        obs=obs,
        var=var,
        shape=(slide.n_spots, 0) if slide.counts is None else None,
    )
    adata.obsm[keys.SPATIAL] = slide.xy
    if slide.image is not None:
        image, scale = slide.image.thumbnail(_THUMBNAIL_PX)
        technology = slide.technology
        fitted = fit_scale(slide.xy, slide.places, LATTICE[technology], PITCH_UM[technology])
        factors = {
            "tissue_hires_scalef": float(scale),
            "spot_diameter_fullres": SPOT_UM[technology] / fitted.um_per_px,
        }
        adata.uns[keys.SPATIAL] = {slide.id: {"images": {"hires": image}, "scalefactors": factors}}
    return adata


def _anndata_parts(
    adata: AnnData, library_key: str | None, coordinates: ArrayLike | None
) -> list[Part]:
    xy = None if coordinates is None else _checked(coordinates, adata.n_obs)
    known = libraries(InMemory(adata))
    if library_key is not None and library_key not in adata.obs:
        raise ConfigError(
            f"obs[{library_key!r}] not found", fix=nearest(library_key, map(str, adata.obs))
        )
    key = library_key or (LIBRARY if LIBRARY in adata.obs else None)
    if key is not None:
        values = adata.obs[key].astype(str).to_numpy()
        masks = {name: values == name for name in sorted(set(values))}
    elif len(known) > 1:
        masks = {n: library_rows(adata.obs, n, known, "the AnnData") for n in known}
    else:
        masks = {}
    if len(masks) < 2:
        kept = adata.uns.get(keys.UNS)
        named = kept.get("slide") if isinstance(kept, Mapping) else None
        library = next(iter(known), None)
        masks = {str(named or library or next(iter(masks), "slide")): np.ones(adata.n_obs, bool)}
        alone = True
    else:
        library, alone = None, False
    return [
        Part(
            id=name,
            table=adata,
            rows=np.flatnonzero(mask),
            read=functools.partial(_read_anndata, adata, library if alone else name, mask, xy),
        )
        for name, mask in masks.items()
    ]


def _read_anndata(
    adata: AnnData,
    library: str | None,
    kept: NDArray[np.bool_],
    xy: NDArray[np.float64] | None,
    options: ReadOptions,
) -> Slide:
    if xy is None and keys.SPATIAL not in adata.obsm:
        raise SlideError(
            f"obsm[{keys.SPATIAL!r}] not found",
            expected="[N, 2] x and y in full-resolution pixels",
            found=f"obsm: {', '.join(adata.obsm) or 'empty'}",
            fix="read the slide with sta.io.read or squidpy.read.visium, or pass coordinates=",
        )
    return read_library(
        InMemory(adata), Path("AnnData"), "slide", library, options, kept=kept, xy=xy
    )


def _checked(coordinates: ArrayLike, n: int) -> NDArray[np.float64]:
    xy = np.asarray(coordinates)
    if xy.shape != (n, 2) or xy.dtype.kind not in "iuf":
        raise ConfigError(
            "coordinates= holds no coordinates",
            expected=f"numbers [{n}, 2], x and y in full-resolution pixels",
            found=f"{xy.dtype} {list(xy.shape)}",
        )
    return xy.astype(np.float64)


def _spatialdata_parts(data: Any, table: str, region: str | None) -> list[Part]:
    if table not in data.tables:
        raise ConfigError(
            f"the SpatialData has no table {table!r}",
            fix=f"pass table=; {nearest(table, data.tables)}" if len(data.tables) else None,
        )
    adata = data.tables[table]
    attributes = adata.uns.get(_ATTRS)
    if attributes is None:
        raise SlideError(f"table {table!r} annotates no region", expected=f"uns[{_ATTRS!r}]")
    regions = sorted(map(str, np.atleast_1d(attributes["region"])))
    if region is not None and region not in regions:
        raise ConfigError(
            f"table {table!r} annotates no region {region!r}", fix=nearest(region, regions)
        )
    of = adata.obs[attributes[_REGION]].astype(str).to_numpy()
    return [
        Part(
            id=name,
            table=adata,
            rows=np.flatnonzero(of == name),
            read=functools.partial(_read_spatialdata, data, adata, name),
        )
        for name in (regions if region is None else [region])
    ]


def _read_spatialdata(data: Any, adata: AnnData, region: str, options: ReadOptions) -> Slide:
    attributes, group = adata.uns[_ATTRS], InMemory(adata)
    obs = read_obs(group, "the table")
    kept = obs[attributes[_REGION]].astype(str).to_numpy() == region
    xy = np.full((len(obs), 2), np.nan)
    xy[kept] = _centres(data, region, obs[attributes[_INSTANCE]][kept])
    spots = read_spots(group, "the table", obs, kept, xy)
    image = None if options.no_image else _image(data, region, options.image)
    slide = spots.slide(id=region, source="SpatialData", given=options.tech, image=image)
    return replace(slide, obs=slide.obs.drop(columns=[attributes[_REGION], attributes[_INSTANCE]]))


def _centres(data: Any, region: str, instances: pd.Series) -> NDArray[np.float64]:
    """[n, 2] centres of the shapes, in the order of the table's instances."""
    if region not in data.shapes:
        raise SlideError(
            f"region {region!r} has no shapes",
            expected="spots as shapes (circles)",
            found=f"shapes: {', '.join(data.shapes) or 'none'}",
        )
    shapes = data.shapes[region]
    rows = shapes.index.get_indexer(pd.Index(instances))
    if (rows < 0).any():
        raise SlideError(
            f"spots of the table have no shape in {region!r}",
            expected=f"a shape for each of {len(rows)} spots",
            found=f"{int((rows < 0).sum())} without one",
        )
    points = shapes.geometry.iloc[rows].centroid
    return np.stack([points.x.to_numpy(), points.y.to_numpy()], axis=1)


def _image(data: Any, region: str, given: Path | None) -> ImageSource:
    """The given image, else the finest one that shares a coordinate system with the spots."""
    if given is not None:
        return open_image(given)
    spots = _scales(data.shapes[region])
    name, scale = finest_image(
        spots,
        {name: _scales(image) for name, image in data.images.items()},
        what=f"the SpatialData holds no image for {region!r}",
        fix="pass image=, or no_image=True to read counts only",
    )
    image = data.images[name]
    levels = [next(iter(node.ds.values())) for node in getattr(image, "children", {}).values()]
    arrays = [level.data for level in (levels or [image])]
    return open_levels(arrays, scale, f"image {name}")


def _scales(element: Any) -> dict[str, float]:
    """Coordinate system -> uniform scale in x and y, of scalings without shift."""
    from spatialdata.transformations import get_transformation

    axes, scales = ("x", "y"), {}
    for system, found in get_transformation(element, get_all=True).items():
        matrix = found.to_affine_matrix(axes, axes)
        if np.allclose(matrix / matrix[0, 0], np.diag([1, 1, 1 / matrix[0, 0]]), rtol=0.01):
            scales[str(system)] = float(matrix[0, 0])
    return scales
