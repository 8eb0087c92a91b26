"""The view as a file: what it holds, what it escapes, what it refuses. In a browser:
test_view_browser.py.
"""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import toys
from st_align import keys, store
from st_align.commands.view import view_file
from st_align.errors import ConfigError, OutputError, SlideError
from st_align.view import build_view

EVIL = "</script><script>alert('x')</script>"


class Scripts(HTMLParser):
    """The content of every script element, by its id; '' for those that run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[dict[str, str | None], str]] = []
        self._open: dict[str, str | None] | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self._open = dict(attrs) if tag == "script" else None

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open is not None:
            self.found.append((self._open, data))

    def json(self, id: str) -> dict:
        return json.loads(next(text for attrs, text in self.found if attrs.get("id") == id))


def toy_view(rng: np.random.Generator, *, image: bool = True) -> anndata.AnnData:
    """36 spots: raw counts of ten genes, three of them predicted, domains and labels."""
    places = toys.hex_places(6, 6)
    xy = toys.hex_xy(places, 20.0)
    counts = rng.poisson(np.arange(1, 11), (36, 10)).astype(np.int32)
    adata = anndata.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame(
            {
                keys.DOMAIN: pd.Categorical(np.where(places[:, 1] < 6, "0", "1")),
                "label": pd.Categorical(np.where(places[:, 1] < 6, "left", "right")),
                "patient": "p1",
                "depth": np.arange(36.0),
            },
            index=[f"s{i}" for i in range(36)],
        ),
        var=pd.DataFrame(index=[f"GENE{i}" for i in range(10)]),
    )
    adata.obsm[keys.SPATIAL] = xy
    predicted = pd.DataFrame(
        {"GENE2": 2.0, "GENE9": xy[:, 0], "ONLY": xy[:, 1]}, index=adata.obs_names
    )
    adata.obsm[keys.PREDICTED] = predicted
    if image:
        pixels = rng.integers(0, 255, (80, 90, 3)).astype(np.uint8)
        factors = {"tissue_hires_scalef": 0.5, "spot_diameter_fullres": 11.0}
        adata.uns[keys.SPATIAL] = {"x": {"images": {"hires": pixels}, "scalefactors": factors}}
    store.note(adata, slide="toy", um_per_px=5.0, domains={"label_key": "label"})
    return adata


@pytest.fixture
def adata(rng):
    return toy_view(rng)


def view_of(adata, tmp_path, **options):
    file = store.write_h5ad(adata, tmp_path / "toy.h5ad")
    result = build_view(file, tmp_path / "view.html", **options)
    html = (tmp_path / "view.html").read_text("utf-8")
    return result, html, Scripts(html).json("data")


def decoded(part: dict) -> np.ndarray:
    steps = np.frombuffer(base64.b64decode(part["steps"]), "<u2")
    return np.where(steps == 65535, np.nan, part["low"] + steps * part["step"])


def test_what_can_be_shown(adata, tmp_path):
    result, html, data = view_of(adata, tmp_path)
    assert result["slide"] == "toy"
    assert result["n_spots"] == 36
    assert result["image"] is True
    assert result["groups"] == ["Domains", "label"]  # neither a constant nor numbers
    assert result["genes"][:3] == ["GENE2", "GENE9", "ONLY"]
    assert set(result["genes"]) == {*adata.var_names, "ONLY"}
    assert data["barcodes"] == list(adata.obs_names)
    domains, labels = data["groups"]
    assert domains["colors"] == labels["colors"]
    assert labels["counts"] == [18, 18]
    assert "Genes: 3 predicted and the 10 most variable." in html
    assert "data:image/jpeg;base64," in html


def test_values_are_those_of_the_file(adata, tmp_path):
    _, _, data = view_of(adata, tmp_path)
    genes = {gene["name"]: gene for gene in data["genes"]}
    counts = adata.X.toarray()
    measured = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(decoded(genes["GENE9"]["measured"]), measured[:, 9], atol=1e-3)
    xy = adata.obsm[keys.SPATIAL]
    np.testing.assert_allclose(decoded(genes["GENE9"]["predicted"]), xy[:, 0], atol=1e-2)
    assert decoded(genes["GENE2"]["predicted"]).tolist() == [2.0] * 36
    assert genes["ONLY"]["measured"] is None
    assert set(genes["ONLY"]["scales"]) == {"predicted"}
    scales = genes["GENE9"]["scales"]
    assert scales["measured"] == scales["predicted"]
    assert scales["difference"][0] == -scales["difference"][1]


def test_genes_and_labels_asked_for(adata, tmp_path):
    result, html, _ = view_of(adata, tmp_path, genes=["GENE1", "ONLY", "GENE1"], label_key="label")
    assert result["genes"] == ["GENE1", "ONLY"]
    assert "Genes: " not in html
    with pytest.raises(SlideError, match=r"(?s)toy\.h5ad.*no gene 'GENE11'.*similar ones: GENE1"):
        view_of(adata, tmp_path, genes=["GENE11"])
    with pytest.raises(SlideError, match=r"(?s)toy\.h5ad.*no column 'layer'"):
        view_of(adata, tmp_path, label_key="layer")


def test_counts_only_and_image_only(rng, tmp_path):
    adata = toy_view(rng, image=False)
    result, html, _ = view_of(adata, tmp_path)
    assert result["image"] is False
    assert "data:image/jpeg" not in html
    bare = anndata.AnnData(obs=adata.obs[["label"]])
    bare.obsm[keys.SPATIAL] = adata.obsm[keys.SPATIAL]
    result, _, _ = view_of(bare, tmp_path)
    assert (result["groups"], result["genes"]) == (["label"], [])


def test_foreign_files_show_what_they_store(adata, tmp_path):
    adata.X = sparse.csr_matrix(np.log1p(adata.X.toarray() / 3))
    adata.var["gene_symbol"] = [f"S{i}" for i in range(10)]
    _, html, data = view_of(adata, tmp_path, genes=["S4"])
    assert "as stored in X" in html
    np.testing.assert_allclose(
        decoded(data["genes"][0]["measured"]), adata.X.toarray()[:, 4], atol=1e-3
    )


def test_spots_without_values_are_none(adata, tmp_path):
    labels = adata.obs["label"].astype(object)
    labels.iloc[:9] = "NA"
    adata.obs["label"] = pd.Categorical(labels)
    adata.obsm[keys.PREDICTED].iloc[0] = np.nan
    _, _, data = view_of(adata, tmp_path)
    assert data["groups"][1]["none"] == 9
    assert np.isnan(decoded(data["genes"][1]["predicted"])[0])


def test_names_are_data_and_scripts_are_named_by_hash(adata, tmp_path):
    adata.var_names = [EVIL.replace("/", ""), *adata.var_names[1:]]
    adata.obs["label"] = adata.obs["label"].cat.rename_categories({"left": EVIL})
    adata.obs[EVIL.replace("/", "")] = pd.Categorical(np.where(adata.obs["depth"] < 9, EVIL, "b"))
    adata.obs_names = [EVIL, *adata.obs_names[1:]]
    adata.obsm[keys.PREDICTED].index = adata.obs_names
    store.note(adata, slide=EVIL, patient=EVIL, tissue=EVIL)
    _, html, data = view_of(adata, tmp_path)
    assert EVIL not in html
    assert data["barcodes"][0] == EVIL
    assert EVIL in data["groups"][1]["names"]
    scripts = Scripts(html).found
    assert [attrs.get("id", "") for attrs, _ in scripts] == ["data", "item", "", "", ""]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    assert policy.count("'sha256-") == 3
    assert not re.search(r"<(?:link|iframe|object|img)\b", html.split("<script")[0])


def test_what_cannot_be_viewed(adata, tmp_path):
    out = tmp_path / "view.html"
    with pytest.raises(SlideError, match="no coordinates"):
        build_view(store.write_h5ad(anndata.AnnData(np.ones((3, 1))), tmp_path / "x.h5ad"), out)
    (tmp_path / "half.h5ad").write_bytes((tmp_path / "x.h5ad").read_bytes()[:900])
    with pytest.raises(SlideError, match="cannot be read as AnnData"):
        build_view(tmp_path / "half.h5ad", out)
    file = store.write_h5ad(adata, tmp_path / "toy.h5ad")
    with pytest.raises(ConfigError, match="names no gene"):
        view_file(file, out, genes=" , ")
    with pytest.raises(ConfigError, match=r"not an \.h5ad file"):
        view_file(tmp_path, out)
    with pytest.raises(OutputError, match=r"to end in \.html"):
        view_file(file, tmp_path / "view.htm")
    assert not out.exists()
    assert view_file(file, out, genes="GENE1, GENE2")["genes"] == ["GENE1", "GENE2"]


def test_bins_are_squares_and_spots_circles(adata, tmp_path):
    def glyph(technology):
        store.note(adata, technology=technology)
        out = tmp_path / "view.html"
        build_view(store.write_h5ad(adata, tmp_path / "a.h5ad"), out)
        plot = Scripts(out.read_text()).json("item")
        [found] = [model for model in models(plot) if model["attributes"].get("name") == "glyph"]
        return found["name"], found["attributes"]

    name, attributes = glyph("VisiumHD-16um")
    assert (name, attributes["width"]["value"], attributes["height"]["value"]) == ("Rect", 55, 55)
    name, attributes = glyph("Visium")
    assert (name, attributes["radius"]["value"]) == ("Circle", 27.5)


def models(node):
    """Every model of a Bokeh document."""
    if isinstance(node, dict):
        if "attributes" in node:
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for part in node:
            yield from models(part)
