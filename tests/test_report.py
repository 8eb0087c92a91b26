from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import anndata
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import toy_run
from st_align import figures, keys, store
from st_align.embedded import to_anndata
from st_align.errors import ConfigError, ModelError, OutputError, SlideError
from st_align.infer import Embedder
from st_align.predict import fit_head, predict, score
from st_align.report import build_report
from st_align.report.tables import facts, score_tables, text
from st_align.shown import slide_view
from toys import toy_prepared

EVIL = "<script>alert('x')</script>"


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def images(self) -> list[str]:
        return [attrs["src"] for tag, attrs in self.tags if tag == "img"]


@pytest.fixture(scope="module")
def slides():
    rng = np.random.default_rng(2)
    return [toy_prepared(rng, id=f"s{i}", patient=f"p{i}") for i in range(2)]


@pytest.fixture(scope="module")
def run(slides):
    return toy_run.toy_run(slides)


@pytest.fixture
def adata(run, slides, rng):
    """An embedded slide with domains, labels and eight predicted genes."""
    slide = toy_prepared(rng, id="new", patient="p9")
    found = to_anndata(run, slide, Embedder(run).embed(slide))
    head = fit_head(run, slides, [f"GENE{i}" for i in range(8)])
    found.obsm[keys.PREDICTED] = predict(head, Embedder(run), slide)
    found.obs[keys.DOMAIN] = pd.Categorical(np.where(slide.spots["domain"] == "left", "1", "0"))
    domains = {"method": "gmm", "use": "gene", "n_domains": 2, "label_key": "domain"}
    domains |= {"ari": {"mean": 0.9123, "std": 0.011, "runs": [0.9, 0.92]}, "nmi": 0.8}
    store.note(
        found, domains=domains, genes=score(predict(head, Embedder(run), slide), slide, head)
    )
    return found


@pytest.fixture
def file(adata, tmp_path):
    return store.write_h5ad(adata, tmp_path / "new.h5ad")


@pytest.fixture
def folder(run, tmp_path):
    folder = toy_run.save(run, tmp_path / "my-run")
    line = {"epoch": 1, "lr": 1e-4, "weight_decay": 0.1, "spots_per_s": 900.0, "loss": 2.0}
    for name in ("spot", "niche", "cross"):
        line |= {name: 2.0, f"ln_{name}": 3.18}
    lines = [json.dumps({**line, "step": i, "spot": 3 - i / 10}) for i in range(1, 7)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def page_of(tmp_path, **parts) -> Page:
    out = build_report(tmp_path / "report.html", **parts)
    return Page(out.read_text(encoding="utf-8"))


def test_a_slide_has_its_picture_domains_labels_and_genes(file, tmp_path):
    page = page_of(tmp_path, files=[file])
    assert len(page.images()) == 3 + 2 * 6
    for words in (
        "Slide new", "Patient p9", "Panel genes measured 100% of 20", "µm",
        "colours matched to the labels", "2 domains by a Gaussian mixture of the gene embedding.",
        "Against domain: ARI 0.912 ± 0.011 over 2 runs, NMI 0.800.",
        "The predictor saw the image only",
        "Shown of 8 genes: the two best, two in the middle, the two worst by PCC.", "All 8 genes",
    ):  # fmt: skip
        assert words in page.text
    assert "encoders.niche_image.licence" in page.text


def test_a_run_has_its_losses_settings_and_slides(folder, tmp_path):
    page = page_of(tmp_path, run=folder)
    assert len(page.images()) == 1
    for words in (
        "Run my-run", "Preset tiny", "Training slides 2", "Training patients 2",
        "toy-colour: BSD-3-Clause", "s0 p0 36", "Held out: z (patients: Z).", "model.dim 8",
        "900 spots/s", "Steps 6 of 6", "panel.n_genes 20",
    ):  # fmt: skip
        assert words in page.text


def test_both_together_with_scores(file, folder, tmp_path):
    rows = [("model", "ari", 0.6, 0.01), ("pca", "ari", 0.3, 0.02), ("model", "mse", 0.9, np.nan)]
    scores = pd.DataFrame(rows, columns=["method", "metric", "mean", "std"])
    page = page_of(tmp_path, run=folder, files=[file], scores=scores, title="Demo")
    for words in ("Demo", "model 0.600 ± 0.010", "pca 0.300", "Slide new", "Training run"):
        assert words in page.text


def test_the_page_stands_alone(file, folder, tmp_path):
    html = build_report(tmp_path / "r.html", run=folder, files=[file]).read_text("utf-8")
    page = Page(html)
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "srcset"):
            assert attrs.get(name, "data:image/").startswith("data:image/")
        assert not any(name.startswith("on") for name in attrs)
    assert not re.search(r"https?://|url\(", html)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    for source in page.images():
        with Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) as picture:
            picture.load()


def test_names_are_shown_and_never_run(adata, folder, tmp_path):
    adata.obs["labels"] = pd.Categorical([f"{EVIL}{i % 2}" for i in range(adata.n_obs)])
    adata.obs[keys.DOMAIN] = adata.obs["labels"]
    gene = EVIL.replace("/", "")  # h5ad has no slashes in names
    adata.obsm[keys.PREDICTED] = adata.obsm[keys.PREDICTED].rename(columns={"GENE0": gene})
    provenance = {EVIL: EVIL}
    store.note(adata, slide=EVIL, patient=EVIL, warnings=[EVIL], provenance=provenance)
    file = store.write_h5ad(adata, tmp_path / "evil.h5ad")
    scores = pd.DataFrame({"method": [EVIL], "metric": [EVIL], "mean": [1.0], "slide": [EVIL]})
    out = tmp_path / "report.html"
    build_report(out, run=folder, files=[file], scores=scores, title=EVIL, label_key="labels")
    html = out.read_text("utf-8")
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") >= 10
    assert EVIL in Page(html).text


def test_a_slide_without_image_counts_domains_or_notes(tmp_path, rng):
    bare = anndata.AnnData(obs=pd.DataFrame(index=list("abcd")))
    bare.obsm[keys.SPATIAL] = rng.normal(size=(4, 2))
    page = page_of(tmp_path, files=[store.write_h5ad(bare, tmp_path / "bare.h5ad")])
    assert "Slide bare" in page.text
    assert page.images() == []
    bare.obsm[keys.PREDICTED] = pd.DataFrame({"G": [1.0, 2, 3, 4]}, index=bare.obs_names)
    page = page_of(tmp_path, files=[store.write_h5ad(bare, tmp_path / "bare.h5ad")])
    assert len(page.images()) == 1
    assert "predicted" in page.text
    assert "measured and predicted" not in page.text.lower()


def test_what_is_not_there_yet_is_said_with_its_command(adata, tmp_path):
    whole = page_of(tmp_path, files=[store.write_h5ad(adata, tmp_path / "new.h5ad")])
    assert "Not in this file yet" not in whole.text
    del adata.obs[keys.DOMAIN], adata.obsm[keys.PREDICTED]
    page = page_of(tmp_path, files=[store.write_h5ad(adata, tmp_path / "a b.h5ad")])
    assert "st-align domains 'a b.h5ad'" in page.text
    assert "st-align genes predict" in page.text
    for name in [name for name in adata.obsm if name.startswith(keys.EMBEDDING)]:
        del adata.obsm[name]
    bare = page_of(tmp_path, files=[store.write_h5ad(adata, tmp_path / "bare.h5ad")])
    assert "st-align embed bare.h5ad --model RUN" in bare.text


def test_labels_carried_over_are_drawn_beside_those_that_are_known(adata, tmp_path):
    del adata.obs[keys.DOMAIN]
    adata.obs[keys.LABEL] = adata.obs["domain"].astype(str)
    store.note(adata, annotation={"label_key": "domain"}, domains={})
    page = page_of(tmp_path, files=[store.write_h5ad(adata, tmp_path / "new.h5ad")])
    assert "Labels · domain" in page.text
    assert "Labels carried over" in page.text
    del adata.obs["domain"]
    page = page_of(tmp_path, files=[store.write_h5ad(adata, tmp_path / "new.h5ad")])
    assert "Labels ·" not in page.text


def test_float_images_and_unlabelled_spots(adata, tmp_path):
    images = adata.uns[keys.SPATIAL]["new"]["images"]
    images["hires"] = (images["hires"] / 255).astype(np.float32)
    labels = adata.obs["domain"].astype(object)
    labels.iloc[:9] = "NA"
    adata.obs["domain"] = pd.Categorical(labels)
    page = page_of(tmp_path, files=[store.write_h5ad(adata, tmp_path / "a.h5ad")])
    assert "none 25%" in page.text


def test_what_cannot_be_reported(file, folder, tmp_path):
    out = tmp_path / "report.html"
    with pytest.raises(ConfigError, match="nothing to report on"):
        build_report(out)
    with pytest.raises(SlideError, match="no column 'layer'"):
        build_report(out, files=[file], label_key="layer")
    with pytest.raises(ModelError, match="no run folder"):
        build_report(out, run=tmp_path / "none")
    (folder / "metrics.jsonl").write_text("{no\n")
    with pytest.raises(ModelError, match=r"metrics\.jsonl is damaged"):
        build_report(out, run=folder)
    nowhere = store.write_h5ad(anndata.AnnData(np.ones((3, 1))), tmp_path / "x.h5ad")
    with pytest.raises(SlideError, match="no coordinates"):
        build_report(out, files=[nowhere])
    assert not out.exists()
    with pytest.raises(OutputError, match="cannot write"):
        build_report(file / "r.html", files=[file])
    assert build_report(tmp_path / "new" / "r.html", files=[file]).is_file()


@pytest.mark.parametrize(
    "value",
    [
        "a word",
        {"lib": "a word"},
        {"lib": {"images": "a word", "scalefactors": "another"}},
        {"lib": {"images": {"hires": "picture.png"}, "scalefactors": {"tissue_hires_scalef": 1}}},
        {"lib": {"images": {"hires": np.zeros((4, 4, 3), np.uint8)}}},
    ],
)
def test_a_foreign_picture_is_none(adata, tmp_path, value):
    adata.uns[keys.SPATIAL] = value
    page = page_of(tmp_path, files=[store.write_h5ad(adata, tmp_path / "a.h5ad")])
    assert len(page.images()) == 2 + 2 * 6


def test_notes_of_another_tool_and_damaged_ones(adata, tmp_path):
    path, out = tmp_path / "a.h5ad", tmp_path / "r.html"
    adata.uns[keys.UNS]["domains_json"] = '["edited"]'
    assert "by a Gaussian" not in page_of(tmp_path, files=[store.write_h5ad(adata, path)]).text
    adata.uns[keys.UNS]["domains_json"] = "{edited"
    with pytest.raises(SlideError, match=r"(?s)a\.h5ad.*domains_json.*JSON"):
        build_report(out, files=[store.write_h5ad(adata, path)])
    adata.uns[keys.UNS] = "a word"
    assert "Slide a" in page_of(tmp_path, files=[store.write_h5ad(adata, path)]).text
    with pytest.raises(SlideError, match=r"(?s)uns\['stalign'\].*str"):
        store.note(adata, slide="b")
    assert adata.uns[keys.UNS] == "a word"


@pytest.mark.parametrize("xy", [np.full((2, 2), np.nan), np.ones((2, 1)), np.ones((0, 2))])
def test_coordinates_that_are_none(tmp_path, xy):
    bare = anndata.AnnData(obs=pd.DataFrame(index=[f"s{i}" for i in range(len(xy))]))
    bare.obsm[keys.SPATIAL] = xy
    with pytest.raises(SlideError, match=r"(?s)bare\.h5ad.*no coordinates"):
        build_report(tmp_path / "r.html", files=[store.write_h5ad(bare, tmp_path / "bare.h5ad")])


def test_an_unfinished_run_says_so(run, tmp_path):
    started = dataclasses.replace(run, provenance={**run.provenance, "finished": False, "step": 2})
    page = page_of(tmp_path, run=toy_run.save(started, tmp_path / "run"))
    assert "The training has not ended." in page.text
    assert page.images() == []


def test_spots_have_their_physical_size(rng):
    # Two spots 100 px apart with a diameter of 40: each covers its circle of the map.
    view = figures.SlideView(xy=np.array([[0.0, 0.0], [100.0, 0.0], [50.0, 80.0]]), diameter=40.0)
    uri = figures.groups_map(view, ["a", "a", "b"], {"a": "#ff0000", "b": "#0000ff"})
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))) as picture:
        pixels = np.asarray(picture.convert("RGBA"))
    x0, x1, *_ = view.extent
    per_px = (x1 - x0) / pixels.shape[1]
    covered = (pixels[..., 3] > 127).sum() * per_px**2
    assert covered == pytest.approx(3 * np.pi * 20**2, rel=0.02)
    red = (pixels[..., 0] > 200) & (pixels[..., 3] > 127)
    assert red.sum() * per_px**2 == pytest.approx(2 * np.pi * 20**2, rel=0.02)


def test_domains_take_the_colours_of_the_labels_they_overlap():
    labels = ["L1"] * 5 + ["L2"] * 5 + ["WM"] * 5 + [""] * 2
    domains = ["7"] * 5 + ["10"] * 5 + ["2"] * 5 + ["11", ""]
    of_labels = figures.matched_colors(labels, None)
    of_domains = figures.matched_colors(domains, labels)
    assert list(of_domains) == ["2", "7", "10", "11"]
    assert of_domains["7"] == of_labels["L1"]
    assert of_domains["10"] == of_labels["L2"]
    assert of_domains["2"] == of_labels["WM"]
    assert len(set(of_domains.values())) == 4


def test_bins_of_visium_hd_are_squares_that_touch():
    places = np.stack(np.divmod(np.arange(9), 3), axis=1).astype(float)
    view = figures.SlideView(xy=10 * places, diameter=10.0, is_square=True)
    uri = figures.groups_map(view, ["a"] * 9, {"a": "#ff0000"})
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))) as picture:
        pixels = np.asarray(picture.convert("RGBA"))
    x0, x1, *_ = view.extent
    covered = (pixels[..., 3] > 127).sum() * ((x1 - x0) / pixels.shape[1]) ** 2
    assert covered == pytest.approx(30**2, rel=0.01)


def test_bins_without_a_picture_touch_too():
    xy = np.stack(np.divmod(np.arange(9), 3), axis=1) * 8.0
    adata = anndata.AnnData(
        obs=pd.DataFrame(index=[str(i) for i in range(9)]), obsm={"spatial": xy}
    )
    store.note(adata, technology="VisiumHD-8um")
    view = slide_view(adata)
    assert (view.is_square, view.diameter) == (True, 8.0)
    store.note(adata, technology="Visium")
    assert slide_view(adata).diameter == pytest.approx(4.4)


def test_unknown_is_grey_and_takes_no_colour_of_a_label():
    labels = ["L1"] * 3 + ["L2"] * 3
    carried = ["L1", "L1", "unknown", "L2", "L2", "unknown"]
    colors = figures.matched_colors(carried, labels)
    assert colors == {**figures.matched_colors(labels, None), "unknown": figures.UNKNOWN_COLOR}
    assert figures.matched_colors(carried, None) == colors
    assert figures.matched_colors(["unknown"], None) == {"unknown": figures.UNKNOWN_COLOR}


def test_colours_stay_apart():
    assert len(set(figures.palette(21))) == 21
    assert figures.palette(22)[21] == figures.palette(1)[0]


def test_scores_become_a_table_per_metric():
    rows = [
        ("a", "model", "ari", 0.5, 0.1), ("b", "model", "ari", 0.7, 0.1),
        ("a", "pca", "ari", 0.6, 0.0), ("b", "pca", "ari", 0.2, 0.0),
        ("a", "model", "mse", 0.9, None), ("a", "mean", "mse", 1.0, None),
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["slide", "method", "metric", "mean", "std"])
    ari, mse = score_tables(frame)
    assert [c["name"] for c in ari["columns"]] == ["method", "a", "b", "mean"]
    assert [[c["value"] for c in row] for row in ari["rows"]] == [
        ["model", "0.500", "0.700", "0.600"],
        ["pca", "0.600", "0.200", "0.400"],
    ]
    assert [[c["best"] for c in row] for row in ari["rows"]] == [
        [False, False, True, True],
        [False, True, False, False],
    ]
    assert [row[1]["best"] for row in mse["rows"]] == [True, False]
    assert mse["rows"][0][1]["spread"] == ""


def test_other_tables_are_shown_as_they_are():
    (table,) = score_tables(pd.DataFrame({"what": ["x"], "n": [1234], "share": [0.5]}))
    assert [[c["value"] for c in row] for row in table["rows"]] == [["x", "1,234", "0.500"]]


def test_text_of_values():
    values = [None, float("nan"), True, 12345, 0.12345, 0.0, 3e-5, 1234.5, ["a", 2], []]
    expected = ["–", "–", "yes", "12,345", "0.123", "0.000", "3.00e-05", "1,234", "a, 2", "none"]
    assert [text(v) for v in values] == expected
    assert facts([("a", 0), ("b", None), ("c", "")]) == {"a": "0"}
