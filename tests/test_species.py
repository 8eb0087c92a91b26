"""Genes of another species: refused in a corpus, renamed by a table of orthologues."""

from __future__ import annotations

import numpy as np
import pytest

from sources import section, write_h5ad
from st_align.errors import SlideError
from st_align.io import ReadOptions, find_slides, read_one

N = 24


def mouse(**changes):
    s = section("m")
    symbols = np.array([f"Gene{chr(97 + i)}" for i in range(N)])
    counts = np.random.default_rng(0).poisson(2.0, (len(s.barcodes), N)).astype(np.int32)
    ensembl = np.array([f"ENSMUSG{i:011d}" for i in range(N)])
    return s.with_(symbols=symbols, ensembl=ensembl, counts=counts, **changes)


@pytest.fixture
def path(tmp_path):
    write_h5ad(tmp_path / "m.h5ad", mouse())
    return tmp_path / "m.h5ad"


@pytest.fixture
def table(tmp_path):
    rows = ["from,to", "Genea,ALPHA", f"ENSMUSG{1:011d},BETA", "Genec,ALPHA", "Absent,GAMMA"]
    (tmp_path / "map.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "map.csv"


def test_mouse_genes_are_refused_where_only_human_ones_fit(path):
    [ref] = find_slides([path], ReadOptions(any_species=False)).refs
    with pytest.raises(SlideError, match="are not human ones") as caught:
        ref.read()
    assert "--gene-map" in caught.value.fix
    assert read_one(path).n_spots > 2


def test_orthologues_rename_and_add_up(path, table):
    before = read_one(path)
    slide = read_one(path, ReadOptions(gene_map=table, any_species=False))
    assert slide.genes.symbols.tolist() == ["ALPHA", "BETA"]
    raw = before.counts.toarray()
    np.testing.assert_array_equal(slide.counts.toarray(), np.c_[raw[:, 0] + raw[:, 2], raw[:, 1]])
    np.testing.assert_array_equal(slide.total_umi, raw.sum(axis=1))
    assert any("3 of 24 genes renamed" in text for text in slide.warnings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from,to\nA,B\nA,C\n", "gives two names to one gene"),
        ("from,to\nOther,B\n", "names no gene of slide 'm'"),
        ("a,b\nOther,B\n", "from"),
    ],
)
def test_bad_gene_maps(path, tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(SlideError, match=message):
        read_one(path, ReadOptions(gene_map=tmp_path / "bad.csv"))
