"""Writes a small section in every source format, each with the exact layout of its writer.

The image encodes its own coordinates: red grows with x, green with y. A crop therefore tells
where it was cut, whatever the format's axes and scale factors are.
"""

from __future__ import annotations

import gzip
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from PIL import Image
from scipy import sparse
from scipy.io import mmwrite

from toys import hex_places, hex_xy

HEIGHT, WIDTH, PITCH = 300, 360, 40.0
SMALL = """
[model]
dim = 16
heads = 2
tokens = 4
gene_layers = 1
[data]
panel = 10
[optim]
batch = 16
epochs = 1
[readout]
dims = 4
"""
"""A model small enough for sections of this size."""


@dataclass(frozen=True)
class Section:
    id: str
    barcodes: np.ndarray
    places: np.ndarray
    xy: np.ndarray
    counts: np.ndarray
    symbols: np.ndarray
    ensembl: np.ndarray
    image: np.ndarray

    def with_(self, **changes: Any) -> Section:
        return replace(self, **changes)

    def rows(self, rows: Any) -> Section:
        names = ("barcodes", "places", "xy", "counts")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


def coordinate_image(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    colours = np.stack([x * 255 / width, y * 255 / height, np.full_like(x, 128.0)], axis=-1)
    return colours.astype(np.uint8)


def section(id: str = "S1", *, technology: str = "Visium", seed: int = 0) -> Section:
    rng = np.random.default_rng(seed)
    if technology == "Visium":
        places = hex_places(6, 7)
        xy = hex_xy(places, PITCH)
        bases = rng.choice(list("ACGT"), (len(places), 16))
        barcodes = np.array([f"{''.join(row)}-1" for row in bases])
    else:
        places = np.array([(r, c) for r in range(3, 8) for c in range(10, 16)], np.int32)
        xy = (places[:, ::-1] - [9, 2]) * PITCH * 1.05
        barcodes = np.array([f"{id}_{c}x{r}" for r, c in places])
    order = rng.permutation(len(places))
    return Section(
        id=id,
        barcodes=barcodes[order],
        places=places[order],
        xy=np.round(xy[order]),
        counts=rng.poisson(1.0, (len(places), 12)).astype(np.int32),
        symbols=np.array([f"GENE{i}" for i in range(12)]),
        ensembl=np.array([f"ENSG{i:011d}" for i in range(12)]),
        image=coordinate_image(),
    )


def shrunk(image: np.ndarray, factor: float) -> Image.Image:
    height, width = image.shape[:2]
    return Image.fromarray(image).resize((round(width * factor), round(height * factor)))


# --- Space Ranger -------------------------------------------------------------------------------


def write_spaceranger(
    sample: Path,
    s: Section,
    *,
    positions: str = "list",
    matrix: str = "h5",
    images: tuple[str, ...] = ("hires", "lowres"),
    antibodies: int = 0,
    off_tissue: int = 3,
) -> Path:
    """Write `sample`/outs; `positions` list | csv | parquet, `matrix` h5 | h5v2 | mtx | mtx.gz."""
    outs = sample / "outs"
    spatial = outs / "spatial"
    spatial.mkdir(parents=True)
    write_positions(spatial, s, positions, off_tissue)
    factors = {"spot_diameter_fullres": 26.0, "fiducial_diameter_fullres": 42.0}
    for name, factor in (("hires", 0.5), ("lowres", 0.25)):
        factors[f"tissue_{name}_scalef"] = factor
        if name in images:
            shrunk(s.image, factor).save(spatial / f"tissue_{name}_image.png")
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors))
    write_matrix(outs, s, matrix, antibodies)
    return outs


def write_positions(spatial: Path, s: Section, kind: str, off_tissue: int = 0) -> None:
    """All places of the area: those of the section, and some that hold no tissue."""
    table = pd.DataFrame(
        {
            "barcode": s.barcodes,
            "in_tissue": 1,
            "array_row": s.places[:, 0],
            "array_col": s.places[:, 1],
            "pxl_row_in_fullres": s.xy[:, 1].astype(int),
            "pxl_col_in_fullres": s.xy[:, 0].astype(int),
        }
    )
    empty = pd.DataFrame(
        [(f"{'ACGT'[i % 4] * 16}-1", 0, 70, 2 * i, 290, 10 * i) for i in range(off_tissue)],
        columns=table.columns,
    )
    table = pd.concat([empty, table.iloc[::-1]], ignore_index=True)
    if kind == "list":
        table.to_csv(spatial / "tissue_positions_list.csv", header=False, index=False)
    elif kind == "csv":
        table.to_csv(spatial / "tissue_positions.csv", index=False)
    else:
        table.to_parquet(spatial / "tissue_positions.parquet", index=False)


def write_matrix(outs: Path, s: Section, kind: str, antibodies: int = 0) -> None:
    """Gene expression, then `antibodies` features with large counts (as CytAssist files hold)."""
    n = len(s.barcodes)
    counts = np.concatenate([s.counts, np.full((n, antibodies), 99, np.int32)], axis=1)
    names = [*s.symbols, *(f"CD{i}.1" for i in range(antibodies))]
    ids = [*s.ensembl, *(f"CD{i}" for i in range(antibodies))]
    types = ["Gene Expression"] * len(s.symbols) + ["Antibody Capture"] * antibodies
    csr = sparse.csr_matrix(counts)
    if kind.startswith("mtx"):
        folder = outs / "filtered_feature_bc_matrix"
        folder.mkdir()
        mmwrite(folder / "matrix.mtx", csr.T.tocoo(), field="integer")
        rows = zip(ids, names, types, strict=True)
        features = "".join("\t".join(row) + "\n" for row in rows)
        (folder / "features.tsv").write_text(features)
        (folder / "barcodes.tsv").write_text("".join(f"{b}\n" for b in s.barcodes))
        if kind.endswith("gz"):
            for path in list(folder.iterdir()):
                Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
        return
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "w") as file:
        group = file.create_group("GRCh38" if kind == "h5v2" else "matrix")
        group["barcodes"] = s.barcodes.astype("S")
        group["data"], group["indices"], group["indptr"] = csr.data, csr.indices, csr.indptr
        group["shape"] = np.array(csr.shape[::-1], np.int32)
        if kind == "h5v2":
            group["genes"], group["gene_names"] = np.array(ids, "S"), np.array(names, "S")
            return
        features = group.create_group("features")
        features["_all_tag_keys"] = np.array([b"genome"])
        features["id"], features["name"] = np.array(ids, "S"), np.array(names, "S")
        features["feature_type"] = np.array(types, "S")
        features["genome"] = np.array(["GRCh38"] * len(s.symbols) + [""] * antibodies, "S")


# --- AnnData ------------------------------------------------------------------------------------


def to_anndata(s: Section, *, library: str | None = None, image: str | None = "hires") -> Any:
    """Squidpy's convention; `image` None leaves uns['spatial'] out."""
    adata = anndata.AnnData(
        sparse.csr_matrix(s.counts),
        obs=pd.DataFrame(
            {"array_row": s.places[:, 0], "array_col": s.places[:, 1]}, index=list(s.barcodes)
        ),
        var=pd.DataFrame({"gene_symbol": s.symbols}, index=list(s.ensembl)),
    )
    adata.obsm["spatial"] = s.xy
    if image is not None:
        pixels = np.asarray(shrunk(s.image, 0.5), np.float32) / 255  # as scanpy reads a PNG
        adata.uns["spatial"] = {
            library or s.id: {
                "images": {image: pixels},
                "scalefactors": {f"tissue_{image}_scalef": 0.5, "spot_diameter_fullres": 26.0},
            }
        }
    return adata


def write_h5ad(path: Path, s: Section, **options: Any) -> Path:
    to_anndata(s, **options).write_h5ad(path)
    return path


# --- STimage-1K4M -------------------------------------------------------------------------------


def write_stimage(root: Path, s: Section, technology: str, *, image: str = "JPEG") -> Path:
    """One slide of `root`/`technology`; the image is named .png whatever it is."""
    folder = root / technology
    for part in ("coord", "gene_exp", "image"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names = [b if b.startswith(s.id) else f"{s.id}_{b}" for b in s.barcodes]
    coordinates = pd.DataFrame(
        {"yaxis": s.xy[:, 1], "xaxis": s.xy[:, 0], "r": PITCH * 0.27}, index=names
    )
    coordinates.to_csv(folder / "coord" / f"{s.id}_coord.csv")
    counts = pd.DataFrame(s.counts, index=names, columns=s.symbols)
    counts.to_csv(folder / "gene_exp" / f"{s.id}_count.csv")
    if image:
        Image.fromarray(s.image).save(folder / "image" / f"{s.id}.png", format=image)
    return folder


# --- SpatialData --------------------------------------------------------------------------------


def write_spatialdata(path: Path, s: Section, *, full: bool = False, hires: bool = True) -> Path:
    """What `spatialdata_io.visium` (0.7) and `SpatialData.write` (0.7, zarr v3) leave on disk."""
    import zarr

    root = zarr.open_group(path, mode="w", zarr_format=3)
    root.attrs["spatialdata_attrs"] = {
        "version": "0.2",
        "spatialdata_software_version": "0.7.3",
    }
    systems = {s.id: 1.0, f"{s.id}_downscaled_hires": 0.5, f"{s.id}_downscaled_lowres": 0.25}
    images = root.create_group("images")
    if full:
        levels = [s.image, np.asarray(shrunk(s.image, 0.5))]
        _write_image(images, f"{s.id}_full_image", levels, {s.id: 1.0})
    for name, factor in (("hires", 0.5), ("lowres", 0.25)) if hires else ():
        systems_of_image = {f"{s.id}_downscaled_{name}": 1.0, s.id: 1 / factor}
        pixels = [np.asarray(shrunk(s.image, factor))]
        _write_image(images, f"{s.id}_{name}_image", pixels, systems_of_image)
    shapes = root.create_group("shapes").create_group(s.id)
    shapes.attrs.update(
        {
            "encoding-type": "ngff:shapes",
            "axes": ["x", "y"],
            "coordinateTransformations": _transformations("xy", systems),
            "spatialdata_attrs": {"version": "0.3"},
        }
    )
    _write_points(path / "shapes" / s.id / "shapes.parquet", s)
    _write_table(root.create_group("tables"), s)
    consolidate(path)
    return path


def consolidate(path: Path) -> None:
    """Write all metadata into the root again, as SpatialData does."""
    import zarr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # shapes.parquet is no zarr
        zarr.consolidate_metadata(path)


def write_element(group: Any, name: str, value: Any) -> None:
    """Write an AnnData element into a zarr group."""
    from anndata.io import write_elem

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on the shards of anndata's next version
        write_elem(group, name, value)


def _transformations(axes: str, systems: dict[str, float]) -> list[dict[str, Any]]:
    described = [{"name": a, "type": "channel" if a == "c" else "space"} for a in axes]
    rows = []
    for name, scale in systems.items():
        row: dict[str, Any] = {"type": "identity"}
        if scale != 1:
            row = {"type": "scale", "scale": [1.0 if a == "c" else scale for a in axes]}
        row["input"] = {"name": axes, "axes": described}
        row["output"] = {"name": name, "axes": described}
        rows.append(row)
    return rows


def _write_image(
    images: Any, name: str, levels: list[np.ndarray], systems: dict[str, float]
) -> None:
    group = images.create_group(name)
    datasets = []
    for i, pixels in enumerate(levels):
        group.create_array(f"s{i}", data=np.moveaxis(pixels, -1, 0), chunks=(3, 64, 64))
        scale = [1.0, 2.0**i, 2.0**i]
        datasets.append(
            {"path": f"s{i}", "coordinateTransformations": [{"type": "scale", "scale": scale}]}
        )
    group.attrs["ome"] = {
        "version": "0.5-dev-spatialdata",
        "omero": {"channels": [{"label": c} for c in "rgb"]},
        "multiscales": [
            {
                "name": f"/images/{name}",
                "axes": [{"name": a, "type": "space"} for a in "cyx"],
                "datasets": datasets,
                "coordinateTransformations": _transformations("cyx", systems),
            }
        ],
    }
    group.attrs["spatialdata_attrs"] = {"version": "0.3"}


def _write_points(path: Path, s: Section) -> None:
    point = np.dtype([("order", "u1"), ("type", "<u4"), ("x", "<f8"), ("y", "<f8")])
    encoded = [np.array((1, 1, x, y), point).tobytes() for x, y in s.xy]
    index = pd.Index(np.arange(len(s.xy)), name="spot_id")
    frame = pd.DataFrame({"geometry": encoded, "radius": 13.0}, index=index)
    frame.iloc[::-1].to_parquet(path)


def _write_table(tables: Any, s: Section) -> None:
    adata = to_anndata(s, image=None)
    adata.obs["in_tissue"] = 1
    adata.obs["spot_id"] = np.arange(len(s.xy))
    adata.obs["region"] = pd.Categorical([s.id] * len(s.xy))
    adata.var = pd.DataFrame(
        {"gene_ids": s.ensembl, "feature_types": "Gene Expression", "genome": "GRCh38"},
        index=list(s.symbols),
    )
    adata.uns["spatial"] = {s.id: {"metadata": {"software_version": "spaceranger-1.0"}}}
    adata.uns["spatialdata_attrs"] = {
        "region": s.id,
        "region_key": "region",
        "instance_key": "spot_id",
    }
    write_element(tables, "table", adata)
    tables["table"].attrs.update(
        {
            "spatialdata-encoding-type": "ngff:regions_table",
            "region": s.id,
            "region_key": "region",
            "instance_key": "spot_id",
            "version": "0.2",
        }
    )


# --- what every reader must agree on ------------------------------------------------------------


def assert_reads_as(slide: Any, s: Section, *, places: bool = True, image: bool = True) -> None:
    """`slide` is the section `s`, whatever the order of its spots."""
    names = [str(b).removeprefix(f"{s.id}_") for b in slide.barcodes]
    row_of = {str(b).removeprefix(f"{s.id}_"): i for i, b in enumerate(s.barcodes)}
    rows = [row_of[name] for name in names]
    assert slide.id == s.id
    assert sorted(rows) == list(range(len(s.barcodes)))
    np.testing.assert_allclose(slide.xy, s.xy[rows], atol=1e-6)
    if places:
        np.testing.assert_array_equal(slide.places, s.places[rows])
    np.testing.assert_array_equal(slide.counts.toarray(), s.counts[rows])
    assert slide.genes.symbols.tolist() == s.symbols.tolist()
    assert slide.counts.dtype == np.int32
    if image:
        assert_cuts_where_spots_are(slide)


def assert_cuts_where_spots_are(slide: Any) -> None:
    """The colour at each spot tells its place: wrong axes or a wrong scale fail."""
    boxes = np.concatenate([slide.xy - 8, slide.xy + 8], axis=1)
    mean = slide.image.crops(boxes, 8).mean(axis=(1, 2))
    expected = slide.xy * 255 / [WIDTH, HEIGHT]
    np.testing.assert_allclose(mean[:, :2], expected, atol=4)
