"""A simulated corpus is one that `prepare` might have written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from st_align.corpus import SPOT_PATCHES, Corpus, read_record, sha256
from st_align.corpus_build import build_corpus
from st_align.errors import ConfigError
from st_align.io import ReadOptions, find_slides
from st_align.simulate import corpora, simulate_cohort
from st_align.simulate.constants import Constants
from st_align.simulate.corpora import Pool, write_hole
from st_align.simulate.section import draw_section
from toys import toy_genes

SPOTS = 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    out = tmp_path_factory.mktemp("simulate") / "corpus"
    summary = simulate_cohort(out, slides=3, spots=SPOTS, layout="corpus")
    assert summary["slides"] == {"P001_S1": "P001", "P001_S2": "P001", "P002_S1": "P002"}
    assert summary["n_spots"] == 3 * SPOTS
    return Corpus.open(out)


def test_it_is_sound_and_of_real_size(corpus: Corpus) -> None:
    assert corpus.verify() == {}
    assert corpus.quarantined == {}
    for slide in corpus.slides():
        assert slide.n_spots == SPOTS
        assert slide.counts.shape == (SPOTS, 18_000)
        assert np.array_equal(slide.counts.sum(axis=1), slide.total_umi)
        assert 1_000 < np.diff(slide.counts.indptr).mean() < 4_000
        assert slide.spots["domain"].nunique() >= 5
        assert len(slide.genes) == 18_000


def test_it_has_the_columns_and_facts_of_a_prepared_one(corpus: Corpus, tmp_path: Path) -> None:
    cohort = tmp_path / "cohort"
    summary = simulate_cohort(cohort, slides=1, spots=SPOTS)
    found = find_slides([cohort / summary["source"]], ReadOptions(obs=cohort / summary["obs"]))
    prepared = build_corpus(found.refs, tmp_path / "prepared", progress=False)
    own, other = corpus.slide("P001_S1"), prepared.slide("P1_S1")
    assert list(own.spots) == list(other.spots)
    assert own.spots.dtypes.to_list() == other.spots.dtypes.to_list()
    ours, theirs = corpus.entry("P001_S1"), prepared.entry("P1_S1")
    assert {key: type(value) for key, value in ours.items()} == {
        key: type(value) for key, value in theirs.items()
    }
    assert set(ours["sha256"]) == set(theirs["sha256"])
    assert set(corpus.manifest) == set(prepared.manifest)
    assert read_record(corpus.folder("P001_S1") / "slide.json")["slide"] == ours
    assert own.um_per_px == pytest.approx(other.um_per_px, rel=0.02)


def test_spots_are_taken_from_their_domain_and_near_their_programme(corpus: Corpus) -> None:
    programme = np.linspace(-2, 2, 100)
    pool = Pool(
        domain=np.repeat([0, 1], 100),
        programme=np.tile(programme, 2),
        counts=None,
        genes=toy_genes(1),
        spot_patches=np.zeros((200, 1, 1, 3), np.uint8),
        niche_patches=np.zeros((200, 1, 1, 3), np.uint8),
    )
    rng = np.random.default_rng(0)
    section = draw_section(rng, Constants(), n_spots=SPOTS, n_domains=2)
    rows = pool.alike(rng, section)
    assert np.array_equal(pool.domain[rows], section.domain)
    wanted = section.programme.clip(-2, 2)
    assert np.abs(pool.programme[rows] - wanted).max() < 0.5
    assert len(set(rows)) > SPOTS / 2
    one, two = corpus.slide("P001_S1"), corpus.slide("P002_S1")
    assert not np.array_equal(one.spots["domain"], two.spots["domain"])
    assert one.spot_patches.std() > 10


def test_equal_arguments_write_equal_bytes(tmp_path: Path) -> None:
    manifests = []
    for name in ("a", "b"):
        simulate_cohort(tmp_path / name, slides=1, spots=50, seed=3, layout="corpus")
        manifests.append((tmp_path / name / "manifest.json").read_bytes())
    assert manifests[0] == manifests[1]


def test_sparse_patches_take_no_room_and_verify(tmp_path: Path) -> None:
    simulate_cohort(tmp_path / "c", slides=1, spots=SPOTS, layout="corpus", sparse=True)
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.verify() == {}
    patches = corpus.folder("P001_S1") / SPOT_PATCHES
    assert patches.stat().st_size > SPOTS * 56 * 56 * 3
    assert 512 * patches.stat().st_blocks < 20_000
    assert not corpus.slide("P001_S1").spot_patches.any()


def test_the_hash_of_a_hole_is_that_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    assert write_hole(path, (3, 1_000_001), "<f2") == sha256(path)
    assert np.load(path).shape == (3, 1_000_001)


def test_only_a_corpus_can_be_sparse(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only a corpus can be sparse"):
        simulate_cohort(tmp_path / "c", sparse=True)
    assert not (tmp_path / "c").exists()


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpora, "write_corpus", fail)
    with pytest.raises(Exception, match="No space left"):
        simulate_cohort(tmp_path / "c", slides=1, spots=50, layout="corpus", sparse=True)
    assert list(tmp_path.iterdir()) == []
