"""What a person types, to the file that is written: sources, their options, the output's place."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pytest

import toy_run
from sources import section, write_h5ad
from st_align import store
from st_align.checkpoint import CONFIG, MODEL, load_run
from st_align.commands import embed
from st_align.commands.embed import embed_corpus, embed_slide
from st_align.commands.output import require_not_source
from st_align.corpus_build import build_corpus
from st_align.corpus_overview import describe
from st_align.errors import ConfigError, ModelError, OutputError, SlideError
from st_align.io import ReadOptions, find_slides
from st_align.overview import overview
from st_align.sources import open_slide
from toys import toy_prepared

PLAIN = ReadOptions()


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A run, two loose slides, and a corpus of them."""
    root = tmp_path_factory.mktemp("work")
    rng = np.random.default_rng(0)
    run = toy_run.toy_run([toy_prepared(rng, id=f"t{i}", n_genes=12) for i in range(2)])
    toy_run.save(run, root / "run")
    (root / "slides").mkdir()
    for seed, id in enumerate(("s1", "s2")):
        write_h5ad(root / "slides" / f"{id}.h5ad", section(id, seed=seed))
    refs = find_slides([root / "slides"]).refs
    build_corpus(refs, root / "corpus", spot_px=16, niche_px=24, progress=False)
    return root


@pytest.fixture
def run(work):
    return str(work / "run")


@pytest.fixture
def slide(work, tmp_path) -> Path:
    """A person's file."""
    return shutil.copy(work / "slides" / "s1.h5ad", tmp_path / "mine.h5ad")


@pytest.mark.parametrize("spelling", ["mine.h5ad", "../{}/mine.h5ad", "link.h5ad"])
def test_the_source_is_never_overwritten(slide, run, tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.h5ad").symlink_to(slide)
    before = slide.read_bytes()
    with pytest.raises(OutputError, match="would overwrite"):
        embed_slide(str(slide), run, Path(spelling.format(tmp_path.name)), PLAIN)
    assert slide.read_bytes() == before
    assert (tmp_path / "link.h5ad").is_symlink()


def test_the_one_slide_of_a_folder_is_never_overwritten(slide, run):
    for spec in (str(slide.parent), f"{slide.parent}::mine", f"{slide}::mine"):
        with pytest.raises(OutputError, match="would overwrite"):
            embed_slide(spec, "no-model-is-looked-for", slide, PLAIN)


def test_an_earlier_output_beside_the_source_is_replaced(slide, run, tmp_path):
    out = tmp_path / "out.h5ad"
    for _ in range(2):
        assert embed_slide(str(slide), run, out, PLAIN)["n_spots"] == 42
    require_not_source(tmp_path / "new.h5ad", str(slide))


def test_a_file_names_its_source_without_the_folders(slide, run, tmp_path):
    embed_slide(str(slide), run, tmp_path / "out.h5ad", PLAIN)
    assert store.notes(anndata.read_h5ad(tmp_path / "out.h5ad"))["source"] == "mine.h5ad"


def test_a_corpus_slide_without_its_image(work, run, tmp_path):
    out = tmp_path / "out.h5ad"
    embed_slide(f"{work / 'corpus'}::s1", run, out, ReadOptions(no_image=True))
    adata = anndata.read_h5ad(out)
    assert "X_stalign_image" not in adata.obsm
    assert "spatial" not in adata.uns
    assert "X_stalign_gene" in adata.obsm


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ReadOptions(image=Path("he.png")), "--image cannot be used"),
        (ReadOptions(format="h5ad", min_spots=3), "--format and --min-spots cannot be used"),
    ],
)
def test_options_that_a_corpus_cannot_take(work, run, tmp_path, options, said):
    with pytest.raises(ConfigError, match=f"{said}(.|\n)*s1 of"):
        embed_slide(f"{work / 'corpus'}::s1", run, tmp_path / "out.h5ad", options)


def test_a_corpus_of_several_slides_lists_them(work, run, tmp_path):
    with pytest.raises(SlideError, match=r"s1, s2(.|\n)*corpus::s1"):
        embed_slide(str(work / "corpus"), run, tmp_path / "out.h5ad", PLAIN)


def test_folders_whose_names_hold_the_separator(work, tmp_path):
    odd = tmp_path / "cohort::2024"
    shutil.copytree(work / "slides", odd / "slides")
    shutil.copytree(work / "corpus", odd / "corpus")
    preprocess = load_run(work / "run").preprocess
    for spec in (f"{odd}/slides::s2", f"{odd}/corpus::s2", f"{odd}/slides/s2.h5ad"):
        assert open_slide(spec, preprocess, PLAIN)[0].id == "s2"
        assert overview(spec, verify=False, no_image=False)["id"] == "s2"
    assert overview(str(odd / "corpus"), verify=False, no_image=False)["n_slides"] == 2


def test_inspect_of_a_corpus_slide(work):
    found = overview(f"{work / 'corpus'}::s2", verify=False, no_image=False)
    loose = overview(str(work / "slides" / "s2.h5ad"), verify=False, no_image=False)
    same = ("kind", "id", "technology", "n_spots", "n_genes", "patient", "obs", "median_umi")
    assert {name: found[name] for name in same} == {name: loose[name] for name in same}
    assert (found["spot_px"], found["niches"]) == (16, ["lattice"])
    blind = overview(f"{work / 'corpus'}::s2", verify=False, no_image=True)
    assert blind["spot_px"] is None
    assert "s2" in describe(found)


def test_inspect_verifies_the_slide_that_is_named(work, tmp_path):
    corpus = shutil.copytree(work / "corpus", tmp_path / "corpus")
    (corpus / "slides" / "s2" / "spot_patches.npy").unlink()
    assert overview(f"{corpus}::s1", verify=True, no_image=False)["damaged"] == {}
    shutil.copy(work / "corpus/slides/s1/spot_patches.npy", corpus / "slides/s2/spot_patches.npy")
    damaged = overview(f"{corpus}::s2", verify=True, no_image=False)["damaged"]
    assert "spot_patches.npy" in damaged["s2"][0]


@pytest.mark.parametrize("name", [CONFIG, MODEL])
def test_a_run_that_lacks_a_file_is_told_which(work, tmp_path, name):
    run = shutil.copytree(work / "run", tmp_path / "runx")
    assert overview(str(run), verify=False, no_image=False)["kind"] == "run"
    (run / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        overview(str(run), verify=False, no_image=False)


def test_a_whole_corpus_goes_into_a_folder_and_is_resumed(work, run, tmp_path):
    corpus, out = str(work / "corpus"), tmp_path / "out"
    assert embed_corpus(corpus, run, out, PLAIN)["embedded"] == 2
    files = sorted(out.iterdir())
    assert [file.name for file in files] == ["s1.h5ad", "s2.h5ad"]
    alone = tmp_path / "alone.h5ad"
    embed_slide(f"{corpus}::s2", run, alone, PLAIN)
    two, one = (store.read_h5ad(file).obsm["X_stalign"] for file in (files[1], alone))
    np.testing.assert_array_equal(two, one)
    files[0].unlink()
    again = embed_corpus(corpus, run, out, PLAIN)
    assert (again["embedded"], again["kept"]) == (1, 1)
    changed = embed_corpus(corpus, run, out, ReadOptions(no_image=True))
    assert (changed["embedded"], changed["kept"]) == (2, 0)


def test_ranks_share_the_slides_of_a_corpus(work, run, tmp_path, monkeypatch):
    """The second of two ranks, which does not have the result."""
    second = SimpleNamespace(global_rank=1, world_size=2, is_global_zero=False)
    second.device, second.all_reduce = "cpu", lambda counts, reduce_op: counts
    monkeypatch.setattr(embed, "launch", lambda: second)
    assert embed_corpus(str(work / "corpus"), run, tmp_path / "out", PLAIN) is None
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["s2.h5ad"]


def test_a_whole_corpus_does_not_go_into_one_file(work, run, tmp_path):
    with pytest.raises(OutputError, match=r"(?s)several slides.*a folder.*::ID"):
        embed_corpus(str(work / "corpus"), run, tmp_path / "out.h5ad", PLAIN)
