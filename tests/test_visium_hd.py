"""Bins of Visium HD: which are read, on which lattice, and patches beyond memory."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import sparse

from st_align import spill
from st_align.errors import ConfigError
from st_align.geometry import fit_scale, neighbors, parse_niche_spec, rings_of
from st_align.io import find_slides, read_one
from st_align.prepare import prepare_slide
from toys import hex_places, hex_xy

SIDE, N_GENES = 12, 9


def write_bins(outs: Path, um: int, *, side: int = SIDE, px: float = 10.0, seed: int = 0) -> Path:
    """`outs`/binned_outputs/square_0NNum as Space Ranger 3 writes it, side x side bins."""
    rng = np.random.default_rng(seed)
    folder = outs / "binned_outputs" / f"square_{um:03d}um"
    spatial = folder / "spatial"
    spatial.mkdir(parents=True)
    row, col = np.divmod(np.arange(side * side), side)
    names = np.array([f"s_{um:03d}um_{r:05d}_{c:05d}-1" for r, c in zip(row, col, strict=True)])
    table = {"barcode": names, "in_tissue": (col > 0).astype(int), "array_row": row}
    table |= {"array_col": col, "pxl_row_in_fullres": (row + 0.5) * px}
    table |= {"pxl_col_in_fullres": (col + 0.5) * px}
    pd.DataFrame(table).to_parquet(spatial / "tissue_positions.parquet")
    factors = {"tissue_hires_scalef": 0.5, "spot_diameter_fullres": px, "bin_size_um": um}
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors))
    height = round(side * px * 0.5)
    pixels = rng.integers(0, 256, (height, height, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(spatial / "tissue_hires_image.png")
    counts = sparse.csr_array(rng.poisson(0.7, (side * side, N_GENES)).astype(np.int32))
    kept = np.flatnonzero(col > 0)
    counts = counts[kept]
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = names[kept].astype("S")
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(counts, part)
        group["shape"] = np.array([N_GENES, len(kept)], np.int32)
        features = group.create_group("features")
        symbols = [f"GENE{i}" for i in range(N_GENES)]
        features["id"] = np.array([f"ENSG{i:011d}" for i in range(N_GENES)], "S")
        features["name"] = np.array(symbols, "S")
        features["feature_type"] = np.array(["Gene Expression"] * N_GENES, "S")
        features["genome"] = np.array(["GRCh38"] * N_GENES, "S")
    return folder


@pytest.fixture
def sample(tmp_path) -> Path:
    write_bins(tmp_path / "brain" / "outs", 8, side=2 * SIDE, px=5.0)
    write_bins(tmp_path / "brain" / "outs", 16)
    return tmp_path / "brain"


def test_bins_of_16_um_are_read_and_those_of_8_when_named(sample):
    assert [ref.id for ref in find_slides([sample.parent]).refs] == ["brain_016um"]
    coarse = read_one(sample)
    assert (coarse.technology, coarse.n_spots) == ("VisiumHD-16um", SIDE * (SIDE - 1))
    fine = read_one(f"{sample}::brain_008um")
    assert (fine.id, fine.technology) == ("brain_008um", "VisiumHD-8um")
    folder = sample / "outs" / "binned_outputs" / "square_008um"
    assert read_one(folder).id == "brain_008um"


def test_scale_and_niches_of_bins(sample):
    prepared = prepare_slide(read_one(sample), ("lattice", "rings2"))
    assert prepared.um_per_px == pytest.approx(1.6)
    assert prepared.niches["lattice"].neighbors.shape[1] == 1 + 4
    assert prepared.niches["rings2"].neighbors.shape[1] == 1 + 12
    inner = (prepared.niches["rings2"].neighbors >= 0).all(axis=1)
    assert inner.sum() == (SIDE - 4) * (SIDE - 5)
    box = prepared.niches["rings2"].boxes[np.flatnonzero(inner)[0]]
    assert box[2] - box[0] == pytest.approx(5 * 10)


@pytest.mark.parametrize(("n", "members"), [(1, 6), (2, 18), (3, 36)])
def test_rings_on_the_hexagon(n, members):
    places = hex_places(13, 13)
    options = {"places": places, "lattice": "hex", "barcodes": np.arange(169).astype(str)}
    spec = "lattice" if n == 1 else f"rings{n}"
    found = neighbors(spec, xy=hex_xy(places, 10.0), **options)
    assert found.shape[1] == 1 + members
    assert (found >= 0).all(axis=1).any()
    first = np.flatnonzero((found >= 0).all(axis=1))[0]
    apart = hex_xy(places, 1.0)[found[first]] - hex_xy(places, 1.0)[first]
    assert np.hypot(*apart.T).max() <= n + 1e-9


def test_specs_of_rings():
    assert (rings_of("lattice"), rings_of("rings3"), rings_of("k3")) == (1, 3, None)
    assert parse_niche_spec("rings3") is None
    with pytest.raises(ConfigError, match="no niche is called 'rings0'"):
        parse_niche_spec("rings0")
    xy = np.random.default_rng(0).normal(size=(9, 2))
    with pytest.raises(ConfigError, match="needs array positions"):
        neighbors("rings2", xy=xy, places=None, lattice="hex", barcodes=np.arange(9).astype(str))


def test_patches_beyond_memory_are_the_same(sample, monkeypatch):
    slide = read_one(sample)
    whole = prepare_slide(slide, ("lattice",), spot_px=16, niche_px=16)
    monkeypatch.setattr(spill, "IN_MEMORY", 1000)
    monkeypatch.setattr(spill, "BLOCK", 3 * 16 * 16 * 3)
    mapped = prepare_slide(slide, ("lattice",), spot_px=16, niche_px=16)
    np.testing.assert_array_equal(whole.spot_patches, mapped.spot_patches)
    np.testing.assert_array_equal(whole.niches["lattice"].patches, mapped.niches["lattice"].patches)


def test_pitch_of_bins(sample):
    slide = read_one(sample)
    assert fit_scale(slide.xy, slide.places, "square", 16.0).pitch_px == pytest.approx(10)
