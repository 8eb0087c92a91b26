"""The view in headless Chromium: it loads offline and in silence, a click changes the colours."""

from __future__ import annotations

import io

import anndata
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import browser
from st_align import keys, store
from st_align.view import build_view
from test_view import EVIL, toy_view

READY = "document.body && document.body.dataset.ready === 'yes'"
SPOT = """(() => {
  const [plot, source] = ["plot", "source"].map((n) => Bokeh.documents[0].get_model_by_name(n));
  const [x, y] = [source.data.x[14], source.data.y[14]];
  const box = document.getElementById("plot").getBoundingClientRect();
  const span = (r) => r.end - r.start;
  return [box.x + ((x - plot.x_range.start) / span(plot.x_range)) * plot.inner_width,
          box.y + ((plot.y_range.end - y) / span(plot.y_range)) * plot.inner_height];
})()"""
LAYER = "[name=layer][value={}]"


@pytest.fixture
def page(tmp_path, rng):
    adata = toy_view(rng)
    adata.obs["label"] = adata.obs["label"].cat.rename_categories({"left": EVIL})
    store.note(adata, slide=EVIL)
    build_view(store.write_h5ad(adata, tmp_path / "toy.h5ad"), tmp_path / "view.html")
    with browser.opened(tmp_path / "profile") as chromium:
        chromium.open(tmp_path / "view.html", READY)
        yield chromium


def pixel(page: browser.Browser) -> np.ndarray:
    """Colour in the middle of a spot, once the frame is drawn."""
    page.run("new Promise((f) => requestAnimationFrame(() => setTimeout(f, 100)))")
    x, y = page.run(SPOT)
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        return np.asarray(shot.convert("RGB"), int)[round(y), round(x)]


def test_a_click_changes_the_colours_without_a_word_from_the_console(page):
    seen = {"domains": pixel(page)}
    page.click(LAYER.format("Genes"))
    seen["measured"] = pixel(page)
    page.click("[name=kind][value=predicted]")
    seen["predicted"] = pixel(page)
    page.click("[name=kind][value=difference]")
    seen["difference"] = pixel(page)
    page.click(LAYER.format("'Histology only'"))
    seen["histology"] = pixel(page)
    colours = list(seen.values())
    for i, one in enumerate(colours):
        for other in colours[:i]:
            assert np.abs(one - other).max() > 8, seen
    assert page.run("document.getElementById('legend').hidden") is True
    assert page.problems == []
    assert page.requests == []


def test_names_are_text(page):
    page.click(LAYER.format("label"))
    assert page.run("document.querySelector('h1').textContent") == EVIL
    assert EVIL in page.run("document.getElementById('key').textContent")
    assert page.run("document.scripts.length") == 5
    assert page.problems == []


def test_a_spot_under_the_pointer_tells_its_values(page):
    x, y = page.run(SPOT)
    page.mouse("mouseMoved", x + 2, y)
    page.mouse("mouseMoved", x, y)
    page.until("!document.getElementById('tip').hidden")
    told = page.run("document.getElementById('tip').innerText").split()
    assert told[0] == "s14"
    assert told[told.index("predicted") + 1] == "2.00"


def test_zoom_keeps_the_proportions_and_the_whole_slide_comes_back(page):
    scale = """(() => { const p = Bokeh.documents[0].get_model_by_name("plot");
      return [(p.x_range.end - p.x_range.start) / p.inner_width,
              (p.y_range.end - p.y_range.start) / p.inner_height] })()"""
    home = page.run(scale)
    assert home[0] == pytest.approx(home[1])
    page.click("#in")
    assert page.run(scale) == pytest.approx([home[0] / 1.5] * 2)
    page.mouse("mouseWheel", 400, 400, deltaX=0, deltaY=-240)
    page.until(f"{scale}[0] < {home[0] / 1.6}")
    wide, high = page.run(scale)
    assert wide == pytest.approx(high)
    page.click("#fit")
    assert page.run(scale) == pytest.approx(home)


def test_genes_are_found_by_a_part_of_their_name(page):
    page.click(LAYER.format("Genes"))
    page.click("#search")
    page.call("Input.insertText", text="only")
    assert page.run("[...document.getElementById('gene').options].map((o) => o.value)") == ["ONLY"]
    assert page.run("document.getElementById('legend-title').textContent") == "ONLY, predicted"
    assert page.run("document.querySelector('[name=kind][value=measured]').disabled") is True


def test_dark_mode_is_dark_and_nothing_is_cut_off_at_1280_by_800(page):
    page.media(prefers_color_scheme="dark")
    page.click(LAYER.format("Genes"))
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        assert np.asarray(shot.convert("L"))[790, 1270] < 40
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    assert page.run("document.querySelector('aside').scrollHeight") <= 800


def test_a_slide_of_nothing_but_counts(tmp_path, rng):
    adata = toy_view(rng, image=False)
    del adata.obs[keys.DOMAIN], adata.obs["label"], adata.obsm[keys.PREDICTED], adata.uns[keys.UNS]
    assert isinstance(adata.obs, pd.DataFrame)
    build_view(store.write_h5ad(adata, tmp_path / "toy.h5ad"), tmp_path / "view.html")
    with browser.opened(tmp_path / "profile") as page:
        page.open(tmp_path / "view.html", READY)
        assert page.run("document.getElementById('legend-title').textContent").startswith("GENE")
        assert page.run("document.querySelectorAll('[name=layer]').length") == 1
        assert page.problems == []


@pytest.mark.slow
def test_twenty_thousand_spots_are_drawn_with_webgl(tmp_path, rng):
    n = 20_000
    toy = toy_view(rng)
    counts, obs = toy.X[rng.integers(0, 36, n)], toy.obs.iloc[rng.integers(0, 36, n)]
    names = [f"s{i}" for i in range(n)]
    adata = anndata.AnnData(counts, obs=obs.set_axis(names), var=toy.var, uns=toy.uns)
    adata.obsm[keys.SPATIAL] = np.c_[np.divmod(np.arange(n), 142)] * 20.0
    build_view(store.write_h5ad(adata, tmp_path / "toy.h5ad"), tmp_path / "view.html")
    assert (tmp_path / "view.html").stat().st_size < 6e6
    with browser.opened(tmp_path / "profile") as page:
        page.open(tmp_path / "view.html", READY)
        views = "[...[...Bokeh.index.roots][0].renderer_views.values()]"
        assert page.run(f"{views}.some((v) => v.glyph && v.glyph.has_webgl())") is True
        # The browser's own thread is the part that a page can make slow: 30 redraws of a pan.
        spent = page.run(
            """(async () => { const p = Bokeh.documents[0].get_model_by_name("plot");
              const view = [...Bokeh.index.roots][0];
              const from = performance.now();
              for (let i = 0; i < 30; i++) {
                p.x_range.setv({start: p.x_range.start + 5, end: p.x_range.end + 5});
                view.paint();
              }
              return (performance.now() - from) / 30 })()"""
        )
        assert spent < 33, f"{spent:.0f} ms a frame"
