"""The report in headless Chromium: light, dark and on paper, without a word from the console."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

import browser
from st_align import store
from st_align.report import build_report
from test_view import EVIL, toy_view


@pytest.fixture
def page(tmp_path, rng):
    adata = toy_view(rng)
    adata.obs["label"] = adata.obs["label"].cat.rename_categories({"left": EVIL})
    store.note(adata, slide=EVIL)
    file = store.write_h5ad(adata, tmp_path / "toy.h5ad")
    build_report(tmp_path / "report.html", files=[file], label_key="label")
    with browser.opened(tmp_path / "profile") as chromium:
        chromium.open(tmp_path / "report.html")
        yield chromium


def corner(page: browser.Browser) -> int:
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        return int(np.asarray(shot.convert("L"))[790, 1270])


def test_it_loads_in_silence_and_shows_every_picture(page):
    assert page.run("[...document.images].every((i) => i.complete && i.naturalWidth > 0)") is True
    assert page.run("document.images.length") >= 3
    assert page.run("document.documentElement.scrollWidth <= innerWidth") is True
    assert page.run("document.scripts.length") == 0
    assert EVIL in page.run("document.body.textContent")
    assert (page.problems, page.requests) == ([], [])


def test_it_is_light_dark_and_white_on_paper(page):
    assert corner(page) > 240
    page.media(prefers_color_scheme="dark")
    assert corner(page) < 40
    page.media(media="print", prefers_color_scheme="dark")
    assert corner(page) > 240
    assert page.run("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"


def test_it_prints(page):
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF")
    assert 1 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 6
