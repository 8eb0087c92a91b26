"""Squares of a physical size, cut again from the slides' own images, on simulated Space Ranger
folders whose colour at a place tells the place.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import sources
from st_align import cli
from st_align.checkpoint import load_run
from st_align.config import override, preset
from st_align.corpus import Corpus
from st_align.encoders._images import FrozenImages, Pixels
from st_align.encoders.base import EncoderInfo, FrozenEntry, register
from st_align.encoders.field import FieldEncoder, sees, with_field
from st_align.errors import ConfigError, CorpusError, SlideError
from st_align.features import cached_features, feature_folder, slide_features
from st_align.io.detect import read_one
from st_align.loader import frozen_encoders
from st_align.prepare import prepare_slide
from st_align.recut import source_image
from toys import toy_prepared

NAME = "toy-place"
UM_PER_PX = 100 / sources.PITCH
PER_PX = 255 / np.array([sources.WIDTH, sources.HEIGHT])
"""Grey levels of red by x and of green by y."""


def place_encoder(side: int | None = 16) -> FrozenImages:
    """Gives back colours: pooled is the mean of a patch, tokens are those of a 4 x 4 grid."""
    pixels = Pixels(side=side, colours=((0.0,) * 3, (1.0,) * 3))
    return FrozenImages(
        NAME,
        nn.Identity,
        lambda network, values: (network(values), values.mean(dim=(2, 3))),
        pixels=pixels,
        dim=3,
        mark="ab" * 6,
    )


register(
    FrozenEntry(
        name=NAME,
        modality="image",
        info=EncoderInfo(title="toy", licence="CC-BY-NC-4.0", gated=False, source="here"),
        load=lambda _: place_encoder(),
    )
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in (1, 2):
        part = sources.section(f"S{number}", seed=number)
        sources.write_spaceranger(tmp_path / "slides" / f"S{number}", part)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys, root):
    """The command in this process: exit code, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["st-align", *map(str, words)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capsys.readouterr())

    code, *said = call("prepare", root / "slides", "--out", root / "corpus")
    assert code == 0, said
    return call


@pytest.fixture
def corpus(run, root) -> Corpus:
    return Corpus.open(root / "corpus")


def cache(corpus, encoder, view="spot", slide="S1"):
    return cached_features(corpus, slide, encoder, view, niche_spec="lattice")


def centres(corpus, view):
    slide = corpus.slide("S1")
    if view == "spot":
        return slide.spots[["x", "y"]].to_numpy()
    boxes = slide.niches["lattice"].boxes
    return (boxes[:, :2] + boxes[:, 2:]) / 2


@pytest.mark.parametrize("view", ["spot", "niche"])
@pytest.mark.parametrize("patch_um", [50.0, 100.0])
def test_squares_lie_around_the_middle_and_have_the_size_asked_for(corpus, view, patch_um):
    found = cache(corpus, with_field(place_encoder(), patch_um), view)
    side = patch_um / UM_PER_PX
    at = centres(corpus, view)
    inside = (at > side).all(axis=1) & (at < [sources.WIDTH - side, sources.HEIGHT - side]).all(
        axis=1
    )
    colours = 255 * found.pooled[inside][:, :2].astype(float)
    np.testing.assert_allclose(colours, at[inside] * PER_PX, atol=2)
    grid = 255 * found.tokens[inside].reshape(-1, 4, 4, 3).astype(float)
    wide = (grid[:, :, 3, 0] - grid[:, :, 0, 0]).mean() / PER_PX[0]
    high = (grid[:, 3, :, 1] - grid[:, 0, :, 1]).mean() / PER_PX[1]
    np.testing.assert_allclose([wide, high], 0.75 * side, rtol=0.05)


def test_every_field_has_a_cache_of_its_own(corpus):
    plain = place_encoder()
    encoders = [plain, *(with_field(plain, um) for um in (50.0, 100.0))]
    folders = {feature_folder(corpus, "S1", e, "spot", "lattice") for e in encoders}
    assert len(folders) == 3
    assert with_field(place_encoder(), 50.0).fingerprint == encoders[1].fingerprint
    assert with_field(plain, None) is plain


def test_a_network_of_any_size_reads_as_many_pixels_as_the_corpus_has(corpus):
    encoder = with_field(place_encoder(side=None), 60.0)
    seen = []
    encoder.encoder.encode_images = lambda p: (seen.append(p.shape), place_encoder(56))[1]
    with pytest.raises(TypeError):  # the stand-in gives no features: its input is what counts
        cache(corpus, encoder)
    assert seen[0][1:] == (56, 56, 3)
    assert "as many pixels" in sees(encoder)


def test_words():
    assert sees(place_encoder()) == "the corpus's patches, resized to 16 px"
    assert sees(place_encoder(None)) == "the corpus's patches, as they are"
    said = sees(with_field(place_encoder(), 112.0))
    assert said == "squares of 112 um cut from each slide's own image, 16 px (7 um/px)"


def test_the_verb_says_what_is_seen_and_how_coarse_the_image_is(run, root):
    words = ("features", root / "corpus", "--encoder", NAME, "--view", "spot")
    code, out, _ = run(*words, "--patch-um", 100, "--json", root / "fine.json")
    assert code == 0
    assert "squares of 100 um cut from each slide's own image, 16 px (6.25 um/px)" in out
    assert "2 slides computed" in out
    assert "warning" not in out
    code, out, _ = run(*words, "--patch-um", 32, "--json", root / "coarse.json")
    assert code == 0
    assert "the image of slide 'S1' has 5 um/px, coarser than the 2 um/px asked for" in out
    fine, coarse = (json.loads((root / f"{n}.json").read_text()) for n in ("fine", "coarse"))
    assert fine["warnings"] == []
    assert len(coarse["warnings"]) == 2
    assert fine["fingerprint"] != coarse["fingerprint"]
    code, out, _ = run(*words, "--patch-um", 32)
    assert "0 slides computed, 2 there already" in out
    assert "has 5 um/px" in out


def refused(run, root: Path, *words: str) -> None:
    code, _, err = run("features", root / "corpus", "--encoder", NAME, "--patch-um", 100)
    assert code == 2
    for word in words:
        assert word in err
    assert not list((root / "corpus").glob("slides/*/features/toy-*"))


def test_a_source_that_is_gone(run, root):
    (root / "slides").rename(root / "elsewhere")
    refused(
        run, root, "'S1' cannot be read again", "slides/S1", "does not exist", "st-align prepare"
    )
    assert run("prepare", root / "elsewhere", "--out", root / "corpus")[0] == 0
    assert run("features", root / "corpus", "--encoder", NAME, "--patch-um", 100)[0] == 0


def test_a_corpus_that_moves_with_its_source(run, root, tmp_path_factory):
    there = tmp_path_factory.mktemp("moved") / "all"
    shutil.move(root, there)
    assert run("features", there / "corpus", "--encoder", NAME, "--patch-um", 100)[0] == 0


def test_a_source_that_has_changed(run, root):
    image = root / "slides" / "S1" / "outs" / "spatial" / "tissue_hires_image.png"
    sources.shrunk(255 - sources.coordinate_image(), 0.5).save(image)
    refused(run, root, "'S1' has changed since the corpus was made", "grey levels")


def test_a_source_that_lost_its_image(run, root):
    for image in (root / "slides" / "S1" / "outs" / "spatial").glob("*.png"):
        image.unlink()
    refused(run, root, "'S1' cannot be read again", "image")


def test_a_corpus_without_images(run, root):
    assert run("prepare", root / "slides", "--no-image", "--out", root / "bare")[0] == 0
    code, _, err = run("features", root / "bare", "--encoder", NAME, "--patch-um", 100)
    assert code == 2
    assert "no slide" in err
    assert "--no-image" in err


def test_a_corpus_of_an_earlier_version(run, root):
    (root / "corpus" / "sources.json").unlink()
    refused(run, root, "does not say where slide 'S1' came from", "st-align prepare")


def test_the_image_that_was_given_is_the_one_read_again(run, root):
    full = root / "full.png"
    sources.shrunk(sources.coordinate_image(), 1).save(full)
    given = ("--image", full, "--out", root / "one")
    assert run("prepare", root / "slides" / "S1", *given)[0] == 0
    words = ("features", root / "one", "--encoder", NAME, "--view", "spot", "--patch-um", 32)
    code, out, _ = run(*words)
    assert code == 0
    assert "has 2.5 um/px" in out


@pytest.mark.parametrize("patch_um", [0.0, -5.0, 1e6, float("nan")])
def test_fields_out_of_range(patch_um):
    with pytest.raises(ConfigError, match="patch_um"):
        with_field(place_encoder(), patch_um)


def test_a_gene_encoder_has_no_field():
    class Genes:
        name, modality = "toy-genes", "gene"

    with pytest.raises(ConfigError, match="reads genes: it has no field"):
        with_field(Genes(), 100.0)


def test_a_slide_whose_image_is_not_at_hand(rng):
    with pytest.raises(SlideError, match="not at hand"):
        slide_features(toy_prepared(rng), with_field(place_encoder(), 50.0), "spot", niche_spec="")


def test_slide_alone_and_corpus_agree(corpus, root):
    encoder = with_field(place_encoder(), 80.0)
    alone = prepare_slide(read_one(root / "slides" / "S1"), ("lattice",))
    for view in ("spot", "niche"):
        found = slide_features(alone, encoder, view, niche_spec="lattice")
        np.testing.assert_array_equal(found.tokens, cache(corpus, encoder, view).tokens)


def test_the_image_of_another_corpus_slide_is_not_taken(corpus):
    with pytest.raises(CorpusError, match="has no slide"):
        cache(corpus, with_field(place_encoder(), 80.0), slide="S9")
    assert source_image(corpus, corpus.slide("S2")).scale == 0.5


FIELD = """niche_image = "toy-place"
[encoders.toy-place]
patch_um = 100
"""
CONFIG = sources.SMALL.replace("[data]", f"{FIELD}[data]")


def test_a_config_chooses_the_field_of_a_preset_and_the_run_keeps_it(run, root):
    (root / "field.toml").write_text(CONFIG)
    held = ("--config", root / "field.toml", "--hold-out-slide", "S2")
    code, _, err = run("train", root / "corpus", "--out", root / "run", *held)
    assert code == 0, err
    trained = load_run(root / "run")
    wanted = with_field(place_encoder(), 100.0)
    assert trained.preprocess.frozen["niche_image"].fingerprint == wanted.fingerprint
    out = root / "S2.h5ad"
    code, _, err = run("embed", root / "slides" / "S2", "--model", root / "run", "--out", out)
    assert code == 0, err
    code, said, _ = run("inspect", out)
    assert "non-commercial only, by the terms of toy-place" in said
    code, _, err = run("train", root / "corpus", "--out", root / "run", "--resume", *held[2:])
    assert code == 2  # without the config the run would see something else


def test_settings_know_the_field():
    config = override(preset("paper"), {"model": {"niche_image": NAME, "spot_gene": "ae-gene"}})
    plain = frozen_encoders(config)["niche_image"]
    near = override(config, {"encoders": {NAME: {"patch_um": 112}}})
    encoder = frozen_encoders(near)["niche_image"]
    assert isinstance(encoder, FieldEncoder)
    assert (encoder.patch_um, encoder.dim, encoder.n_tokens) == (112.0, plain.dim, plain.n_tokens)
    assert encoder.fingerprint != plain.fingerprint
