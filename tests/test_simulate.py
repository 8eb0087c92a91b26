"""Simulated cohorts: read back by the real readers, and as hard as they are meant to be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import label
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import cross_val_predict

from st_align import simulate as module
from st_align.domains import gaussian_mixture
from st_align.errors import ConfigError, OutputError
from st_align.expression import log_normalise
from st_align.geometry import ring_mean
from st_align.io import ReadOptions, find_slides
from st_align.metrics import ari
from st_align.prepare import prepare_slide
from st_align.simulate import simulate_cohort
from st_align.simulate.constants import LINEAR_NICHE_ARI, PCA_KMEANS_ARI
from st_align.simulate.layouts import LAYOUTS, barcodes
from st_align.slide import PreparedSlide, Slide

SPOTS = 150


def read(out: Path, summary: dict[str, Any]) -> list[Slide]:
    options = ReadOptions(patients=out / summary["patients"], obs=out / summary["obs"])
    return [ref.read() for ref in find_slides([out / summary["source"]], options).refs]


def side(out: Path, id: str) -> int:
    with Image.open(out / "slides" / id / "outs/spatial/tissue_hires_image.png") as image:
        return max(image.size)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Slide]]:
    out = tmp_path_factory.mktemp("simulate") / "cohort"
    summary = simulate_cohort(out, slides=3, spots=SPOTS, seed=4)
    return out, summary, read(out, summary)


def test_what_is_returned_is_what_lies_there(cohort) -> None:
    out, summary, slides = cohort
    assert summary["slides"] == {"P1_S1": "P1", "P1_S2": "P1", "P2_S1": "P2"}
    assert json.loads(json.dumps(summary)) == summary
    assert {s.id: s.patient for s in slides} == summary["slides"]
    assert summary["n_genes"] == 1200
    assert 5 <= summary["n_domains"] <= 7
    assert sorted(p.name for p in out.parent.iterdir()) == ["cohort"]
    truth = json.loads((out / summary["truth"]).read_text())
    assert truth["seed"] == 4
    assert len(truth["markers"]) == summary["n_domains"]
    for markers in truth["markers"].values():
        assert not set(markers) & set(truth["programme_log_slopes"])


def test_slides_are_read_whole_and_to_scale(cohort) -> None:
    out, summary, slides = cohort
    for slide in slides:
        assert slide.n_spots == SPOTS
        assert slide.obs["domain"].nunique() == summary["n_domains"]
        assert slide.species == "human"
        assert len(slide.warnings) == 1  # the empty spots
        assert "no counts" in slide.warnings[0]
        prepared = prepare_slide(slide, ("lattice",))
        spot_px = 55 / prepared.um_per_px * 0.25
        assert spot_px == pytest.approx(34, rel=0.01)
        assert len(prepared.warnings) == 1
        assert side(out, slide.id) <= 2000


def test_places_off_the_tissue_are_listed_and_some_of_them_are_holes(cohort) -> None:
    out, _, slides = cohort
    for slide in slides:
        table = pd.read_csv(out / "slides" / slide.id / "outs/spatial/tissue_positions.csv")
        assert table["in_tissue"].sum() == SPOTS
        assert len(table) > 1.3 * SPOTS
        assert table["barcode"].is_unique
        free = np.ones((table["array_row"].max() + 3, table["array_col"].max() // 2 + 3), bool)
        free[table["array_row"] + 1, table["array_col"] // 2 + 1] = table["in_tissue"] == 0
        n_parts = label(free)[1]  # the frame is one part; a hole is another
        assert n_parts >= 2, slide.id


def test_counts_follow_domain_programme_and_library(cohort) -> None:
    out, _, slides = cohort
    truth = json.loads((out / "truth.json").read_text())
    for slide in slides:
        total = slide.total_umi
        assert (total == 0).sum() == 2
        assert 7 < np.quantile(total[total > 0], 0.99) / np.quantile(total[total > 0], 0.01) < 15
        values, valid = log_normalise(slide.counts, total)
        values = pd.DataFrame(values.toarray(), columns=slide.genes.symbols)[valid]
        domain = slide.obs["domain"].to_numpy()[valid]
        for name, markers in truth["markers"].items():
            score = values[markers].mean(axis=1).groupby(domain).mean()
            assert score.idxmax() == name
        slopes = pd.Series(truth["programme_log_slopes"])
        score = (values[slopes.index] * np.sign(slopes)).mean(axis=1)
        programme = slide.obs["programme"].to_numpy(float)[valid]
        assert np.corrcoef(score, programme)[0, 1] > 0.4


def test_counts_vary_more_than_poisson(cohort) -> None:
    counts = cohort[2][0].counts.toarray().astype(float)
    share = counts.sum(0) / counts.sum()
    mean = np.outer(counts.sum(1), share)
    excess = ((counts - mean) ** 2 - mean).sum() / (mean**2).sum()
    assert 0.2 < excess < 1.5  # the dispersion of .35, and what domain and programme add


def test_image_shows_programme_domain_and_stain(cohort) -> None:
    tones = {}
    for slide in cohort[2]:
        patches = prepare_slide(slide, ()).spot_patches.astype(float)
        streaks = [np.abs(np.diff(patches[..., 1], axis=a)).mean(axis=(1, 2)) for a in (1, 2)]
        patches = patches.reshape(SPOTS, -1, 3)
        looks = np.column_stack([patches.mean(axis=1), patches.std(axis=1), *streaks])
        domain = slide.obs["domain"].to_numpy()
        told = cross_val_predict(LinearDiscriminantAnalysis(), looks, domain, cv=3)
        assert (told == domain).mean() > 2 * pd.Series(domain).value_counts(normalize=True).max()
        absorbed = -np.log((patches + 1) / 256).mean(axis=1)
        purple = absorbed[:, 0] / absorbed[:, 1]  # nuclei take red and green, the rest green
        within = purple - pd.Series(purple).groupby(domain).transform("mean").to_numpy()
        programme = slide.obs["programme"].to_numpy(float)
        assert np.corrcoef(within, programme)[0, 1] > 0.5
        tones[slide.id] = patches.mean(axis=(0, 1))
        assert (tones[slide.id][[0, 2]] > tones[slide.id][1] + 10).all()  # pink to purple
    same = np.abs(tones["P1_S1"] - tones["P1_S2"]).max()
    other = np.abs(tones["P1_S1"] - tones["P2_S1"]).max()
    assert other > same


def test_equal_arguments_write_equal_values_and_slides_do_not_depend_on_their_number(
    cohort, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    first = read(again, simulate_cohort(again, slides=1, spots=SPOTS, seed=4))[0]
    before = cohort[2][0]
    assert (first.counts != before.counts).nnz == 0
    pd.testing.assert_frame_equal(first.obs, before.obs)
    image = "slides/P1_S1/outs/spatial/tissue_hires_image.png"
    assert (again / image).read_bytes() == (cohort[0] / image).read_bytes()
    other = tmp_path / "other"
    third = read(other, simulate_cohort(other, slides=1, spots=SPOTS, seed=5))[0]
    assert (third.counts != before.counts).nnz > 1000


def test_stimage_holds_the_same_slides(cohort, tmp_path: Path) -> None:
    out = tmp_path / "root"
    summary = simulate_cohort(out, slides=3, spots=SPOTS, seed=4, layout="stimage")
    assert summary["slides"] == {"SIM001_S1": "P1", "SIM001_S2": "P1", "SIM002_S1": "P2"}
    for slide, twin in zip(read(out, summary), cohort[2], strict=True):
        assert slide.technology == "Visium"
        assert (slide.barcodes == twin.barcodes).all()
        assert (slide.genes.symbols == twin.genes.symbols).all()
        assert (slide.counts != twin.counts).nnz == 0
        assert (slide.obs["domain"] == twin.obs["domain"]).all()
        scale = prepare_slide(slide, ()).um_per_px * 0.25
        assert scale == pytest.approx(prepare_slide(twin, ()).um_per_px, rel=0.01)
    studies = find_slides([out]).refs  # without a table the study gives the patient
    assert [ref.read().patient for ref in studies] == ["SIM001", "SIM001", "SIM002"]


def test_large_slides_fit_the_image(tmp_path: Path) -> None:
    summary = simulate_cohort(tmp_path / "c", slides=1, spots=700)
    assert 1950 < side(tmp_path / "c", "P1_S1") <= 2000
    assert read(tmp_path / "c", summary)[0].n_spots == 700


def test_barcodes_are_distinct() -> None:
    assert len(set(barcodes(20_000))) == 20_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"layout": "spaceranges"}, "did you mean 'spaceranger'"),
        ({"layout": "zarr"}, "spaceranger | stimage | corpus"),
        ({"slides": 0}, "1 or more"),
        ({"spots": 49}, "50 to 15,000"),
        ({"spots": 15_001}, "50 to 15,000"),
        ({"seed": -1}, "0 or more"),
    ],
)
def test_arguments_out_of_range(tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        simulate_cohort(tmp_path / "c", **arguments)
    assert not list(tmp_path.iterdir())


def test_existing_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        simulate_cohort(tmp_path, slides=1, spots=50)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_may_exist(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    simulate_cohort(tmp_path / "c", slides=1, spots=50)
    assert (tmp_path / "c/truth.csv").is_file()


def test_nothing_is_left_when_the_disk_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, slide: object) -> None:
        folder.mkdir()
        raise OSError(28, "No space left on device")

    layout = replace(LAYOUTS["spaceranger"], write=full)
    monkeypatch.setitem(module.LAYOUTS, "spaceranger", layout)
    with pytest.raises(OutputError, match="No space left"):
        simulate_cohort(tmp_path / "c", slides=1, spots=50)
    assert not list(tmp_path.iterdir())


def pca_kmeans(slide: PreparedSlide, k: int) -> np.ndarray:
    values = log_normalise(slide.counts, slide.total_umi)[0].toarray()
    variable = np.argsort(-values.var(axis=0))[:1000]
    scores = PCA(30, random_state=0).fit_transform(values[:, variable])
    return KMeans(k, n_init=5, random_state=0).fit_predict(scores)


def niche_means(slide: PreparedSlide) -> np.ndarray:
    values, valid = log_normalise(slide.counts, slide.total_umi)
    means = ring_mean(values.toarray(), slide.niches["lattice"].neighbors, valid)
    return (means - means.mean(axis=0)).astype(np.float64)


def yardsticks(out: Path, *, seed: int, slides: int) -> np.ndarray:
    """[slides, 2] ARI of PCA + k-means, and of the linear niche baseline fitted on the other
    patients, written out rather than taken from `baselines`: they fixed the constants.
    """
    read_back = read(out, simulate_cohort(out, slides=slides, seed=seed))
    prepared = [prepare_slide(s, ("lattice",), spot_px=8, niche_px=8) for s in read_back]
    niches = [niche_means(slide) for slide in prepared]
    scores = []
    for slide, own in zip(prepared, niches, strict=True):
        truth = slide.spots["domain"].to_numpy()
        k = len(set(truth))
        others = zip(prepared, niches, strict=True)
        train = np.vstack([x for s, x in others if s.patient != slide.patient])
        axes = PCA(16, random_state=0).fit(train).components_
        mixture = gaussian_mixture(own @ axes.T, k, np.random.default_rng(0), starts=12)
        scores.append((ari(truth, pca_kmeans(slide, k)), ari(truth, mixture.labels)))
    return np.array(scores)


def check_bands(scores: np.ndarray) -> None:
    by_spot, by_niche = scores.mean(axis=0)
    assert PCA_KMEANS_ARI[0] <= by_spot <= PCA_KMEANS_ARI[1]
    assert LINEAR_NICHE_ARI[0] <= by_niche <= LINEAR_NICHE_ARI[1]


def test_yardsticks_land_in_their_bands(tmp_path: Path) -> None:
    check_bands(np.vstack([yardsticks(tmp_path / f"{s}", seed=s, slides=3) for s in (0, 1)]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_yardsticks_of_a_whole_cohort_land_in_their_bands(tmp_path: Path, seed: int) -> None:
    check_bands(yardsticks(tmp_path / "c", seed=seed, slides=8))
