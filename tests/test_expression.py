"""Gene names, normalisation and panels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from st_align.errors import ConfigError, CorpusError, ModelError
from st_align.expression import (
    Genes,
    Panel,
    choose_panel,
    log_normalise,
    panel_columns,
    panel_expression,
    read_panel,
    unify_genes,
)
from st_align.geometry import neighbors
from st_align.slide import Niche, PreparedSlide
from toys import toy_prepared


def slide_of(
    counts: np.ndarray,
    symbols: list[str],
    ensembl: list[str] | None = None,
    total_umi: np.ndarray | None = None,
    patient: str = "p0",
) -> PreparedSlide:
    """A slide that has nothing but counts."""
    base = toy_prepared(np.random.default_rng(0), rows=1, cols=len(counts), image=False)
    umi = counts.sum(axis=1) if total_umi is None else total_umi
    return dataclasses.replace(
        base,
        patient=patient,
        spots=base.spots.assign(total_umi=np.asarray(umi, np.float64)),
        counts=sparse.csr_array(np.asarray(counts, np.int32)),
        genes=Genes(
            symbols=np.array(symbols, np.str_),
            ensembl=np.array(ensembl or [""] * len(symbols), np.str_),
        ),
    )


def panel_of(*genes: str, ensembl: tuple[str, ...] | None = None) -> Panel:
    return Panel(genes=genes, ensembl=ensembl or ("",) * len(genes))


class TestUnify:
    def test_duplicates_are_summed_and_nameless_dropped(self):
        counts = sparse.csr_array(np.array([[1, 2, 3, 4], [0, 5, 6, 7]]))
        matrix, genes, said = unify_genes(counts, ["B", "A", "B", ""], ["", "", "ENSG01", None])
        assert genes.symbols.tolist() == ["B", "A"]
        assert genes.ensembl.tolist() == ["ENSG01", ""]
        assert matrix.toarray().tolist() == [[4, 2], [6, 5]]
        assert matrix.dtype == counts.dtype
        assert matrix.has_canonical_format
        assert said == (
            "1 columns repeat the symbol of another and were added to it",
            "1 genes without a name were dropped",
        )

    def test_ensembl_ids_lose_their_version_and_stand_in_for_symbols(self):
        symbols = [None, np.nan, "ENSG00000000003.15", " AC012345.1 ", "ENSMUSG00000000001.4"]
        ensembl = ["ENSG00000000001.5", "", "", "ENSG00000000004.1", ""]
        matrix, genes, said = unify_genes(np.eye(5, dtype=np.int32), symbols, ensembl)
        assert genes.symbols.tolist() == [
            "ENSG00000000001",
            "ENSG00000000003",
            "AC012345.1",
            "ENSMUSG00000000001",
        ]
        assert genes.ensembl.tolist() == [
            "ENSG00000000001",
            "ENSG00000000003",
            "ENSG00000000004",
            "ENSMUSG00000000001",
        ]
        assert matrix.shape == (5, 4)
        assert "the version was cut from 4 Ensembl ids" in said

    def test_what_is_clean_is_left_alone(self):
        counts = sparse.csr_array(np.array([[0, 2], [1, 0]], np.int32))
        matrix, genes, said = unify_genes(counts, ["A", "B"])
        assert said == ()
        assert len(genes) == 2
        np.testing.assert_array_equal(matrix.toarray(), counts.toarray())

    def test_the_source_is_not_touched(self):
        data, indices = np.array([1, 2, 3], np.int32), np.array([1, 0, 1], np.int32)
        counts = sparse.csr_array((data, indices, np.array([0, 3])), shape=(1, 2))
        matrix, _, _ = unify_genes(counts, ["A", "B"])
        assert matrix.toarray().tolist() == [[2, 4]]
        assert indices.tolist() == [1, 0, 1]

    def test_names_that_do_not_fit_the_matrix(self):
        with pytest.raises(ValueError, match="2 columns, 1 symbols"):
            unify_genes(np.eye(2), ["A"])

    @given(st.lists(st.sampled_from(["A", "B", "C", "", "ENSG1.1", "ENSG1.2"]), max_size=8))
    def test_no_molecule_of_a_named_gene_is_lost(self, names):
        counts = np.arange(1, 2 * len(names) + 1).reshape(2, len(names))
        matrix, genes, _ = unify_genes(counts, names)
        named = [bool(name) for name in names]
        assert len(set(genes.symbols.tolist())) == len(genes)
        np.testing.assert_array_equal(matrix.toarray().sum(axis=1), counts[:, named].sum(axis=1))


class TestNormalise:
    def test_golden(self, golden):
        given, wanted = (np.load(golden / "preprocess" / f"{n}.npz") for n in ("inputs", "outputs"))
        for counts, key in (
            ("counts", "log_normalised"),
            ("subset_counts", "subset_log_normalised"),
        ):
            found, valid = log_normalise(sparse.csr_array(given[counts]), given["total_umi"])
            np.testing.assert_allclose(found.toarray(), wanted[key], rtol=1e-7, atol=0)
            np.testing.assert_array_equal(valid, wanted["valid"])
        full = log_normalise(sparse.csr_array(given["counts"]), given["total_umi"])[0]
        np.testing.assert_array_equal(
            full.toarray().astype(np.float16), wanted["log_normalised_float16"]
        )

    def test_equation(self):
        counts = sparse.csr_array(np.array([[3, 0], [0, 0]], np.int32))
        found, valid = log_normalise(counts, np.array([30.0, 0.0]))
        assert found.toarray()[0, 0] == pytest.approx(np.log(1 + 3 / 30 * 1e4))
        assert found.dtype == np.float32
        assert valid.tolist() == [True, False]
        assert np.isfinite(found.toarray()).all()


class TestPanelExpression:
    def test_centred_over_valid_spots_and_zero_elsewhere(self):
        counts = np.array([[1, 9], [5, 5], [0, 0]])
        found = panel_expression(slide_of(counts, ["A", "B"]), panel_of("B", "X", "A"))
        log = np.log1p(counts[:2] / 10 * 1e4)
        wanted = (log - log.mean(axis=0))[:, [1, 0]]
        np.testing.assert_allclose(found.values[:2][:, [0, 2]], wanted, atol=2e-3)
        assert (found.values[2] == 0).all()
        assert (found.values[:, 1] == 0).all()
        assert found.measured.tolist() == [True, False, True]
        assert found.valid.tolist() == [True, True, False]
        assert found.values.dtype == np.float32

    def test_values_are_what_a_float16_cache_gives_back(self, rng):
        found = panel_expression(toy_prepared(rng), panel_of("GENE1", "GENE2")).values
        np.testing.assert_array_equal(found.astype(np.float16).astype(np.float32), found)

    def test_a_renamed_gene_is_found_by_its_ensembl_id(self):
        genes = Genes(
            symbols=np.array(["NEW", "SAME", "ODD"]), ensembl=np.array(["ENSG1", "ENSG2", ""])
        )
        panel = panel_of("OLD", "SAME", "GONE", ensembl=("ENSG1", "ENSG9", ""))
        assert panel_columns(genes, panel).tolist() == [0, 1, -1]

    def test_a_subset_of_genes_changes_nothing_when_the_library_is_given(self, rng):
        counts = rng.poisson(3, (6, 5))
        whole = slide_of(counts, list("ABCDE"))
        part = slide_of(counts[:, :2], list("AB"), total_umi=counts.sum(axis=1))
        np.testing.assert_array_equal(
            panel_expression(whole, panel_of("A", "B")).values,
            panel_expression(part, panel_of("A", "B")).values,
        )

    def test_without_counts_nothing_is_measured(self, rng):
        found = panel_expression(toy_prepared(rng, counts=False), panel_of("GENE1"))
        assert not found.values.any()
        assert not found.measured.any()
        assert not found.valid.any()

    def test_no_shared_gene(self, rng):
        with pytest.raises(ModelError, match="none of the 2 genes") as caught:
            panel_expression(toy_prepared(rng), panel_of("GAPDH", "ACTB"))
        assert "mouse" not in str(caught.value)

    def test_mouse_genes_are_called_so(self):
        slide = slide_of(np.ones((2, 3)), ["Gapdh", "Actb", "Mbp"])
        with pytest.raises(ModelError, match="look like mouse"):
            panel_expression(slide, panel_of("GAPDH", "ACTB"))
        human = slide_of(np.ones((2, 2)), ["GAPDH", "ACTB"])
        with pytest.raises(ModelError, match="look like human, the model's like mouse"):
            panel_expression(human, panel_of("Gapdh", "Actb"))

    def test_a_symbol_that_coincides_makes_no_human_of_a_mouse(self):
        panel = panel_of(*(f"GENE{i}" for i in range(50)))
        slide = slide_of(np.ones((2, 51)), ["GENE7", *(f"Gene{i}" for i in range(50))])
        with pytest.raises(ModelError, match="has 1 of the 50 genes") as caught:
            panel_expression(slide, panel)
        assert "human orthologues" in caught.value.fix
        more = slide_of(np.ones((2, 53)), [*panel.genes[:3], *(f"Gene{i}" for i in range(50))])
        assert panel_expression(more, panel).measured.sum() == 3

    def test_a_human_slide_may_share_little(self):
        panel = panel_of(*(f"GENE{i}" for i in range(50)))
        slide = slide_of(np.ones((2, 40)), ["GENE7", *(f"OTHER{i}" for i in range(38)), "C1orf9"])
        assert panel_expression(slide, panel).measured.sum() == 1


class TestChoosePanel:
    @staticmethod
    def varied(rng: np.random.Generator, symbols: list[str], high: str, **kwargs) -> PreparedSlide:
        """Two halves that differ in the gene `high` only."""
        counts = rng.poisson(20, (60, len(symbols)))
        counts[:, symbols.index(high)] = np.where(np.arange(60) < 30, 400, 0)
        return slide_of(counts, symbols, **kwargs)

    def test_takes_what_varies_within_slides(self, rng):
        slides = [self.varied(rng, list("ABCD"), "C") for _ in range(3)]
        assert choose_panel(slides, 1).genes == ("C",)
        assert len(choose_panel(slides, 99)) == 4

    def test_takes_what_neighbours_share(self, rng):
        counts = rng.poisson(20, (60, 3))
        counts[:, 1] = np.where(np.arange(60) % 2, 30, 10)
        counts[:, 2] = np.where(np.arange(60) < 30, 30, 10)
        assert choose_panel([slide_of(counts, list("ABC"))], 1).genes == ("C",)

    def test_a_difference_between_slides_chooses_nothing(self, rng):
        slides = [self.varied(rng, list("ABCD"), "C") for _ in range(2)]
        batch = slides[1].counts.toarray()
        batch[:, 0] *= 30
        slides[1] = slide_of(batch, list("ABCD"))
        assert choose_panel(slides, 1).genes == ("C",)

    def test_only_genes_that_half_of_the_slides_measured(self, rng):
        slides = [
            self.varied(rng, ["A", "B", "X"], "X"),
            self.varied(rng, ["A", "B", "Y"], "Y"),
            self.varied(rng, ["A", "B", "Y"], "Y"),
        ]
        panel = choose_panel(slides, 10)
        assert "Y" in panel.genes
        assert "X" not in panel.genes

    def test_a_patient_weighs_the_same_however_many_slides(self, rng):
        slides = [self.varied(rng, list("ABC"), "A", patient="p1") for _ in range(4)]
        slides += [self.varied(rng, list("ABC"), "B", patient=name) for name in ("p2", "p3")]
        assert choose_panel(slides, 1).genes == ("B",)

    def test_a_gene_that_all_slides_measured_comes_before_one_that_half_did(self, rng):
        slides = [
            self.varied(rng, ["A", "B", "X"], "X", patient="p1"),
            self.varied(rng, ["A", "B", "Y"], "B", patient="p2"),
        ]
        assert choose_panel(slides, 1).genes == ("B",)

    def test_the_order_of_many_spots_does_not_matter(self, rng):
        slide = toy_prepared(rng, rows=40, cols=40, image=False, n_genes=12)
        order = rng.permutation(slide.n_spots)
        where = np.argsort(order)
        near = slide.niches["lattice"].neighbors[order]
        niche = dataclasses.replace(
            slide.niches["lattice"], neighbors=np.where(near >= 0, where[near], -1)
        )
        shuffled = dataclasses.replace(
            slide,
            spots=slide.spots.iloc[order].reset_index(drop=True),
            counts=slide.counts[order],
            niches={"lattice": niche},
        )
        barcodes = slide.spots["barcode"].to_numpy()
        shuffled_codes = shuffled.spots["barcode"].to_numpy()
        assert (barcodes[slide.spread(1000)] == shuffled_codes[shuffled.spread(1000)]).all()
        assert choose_panel([slide], 12) == choose_panel([shuffled], 12)

    def test_spike_ins_are_not_genes(self, rng):
        slides = [self.varied(rng, ["A", "ERCC-00002", "B"], "ERCC-00002")]
        assert set(choose_panel(slides, 3).genes) == {"A", "B"}

    def test_ties_go_by_name_and_the_order_of_slides_does_not_matter(self, rng):
        counts = np.repeat(rng.poisson(3, (9, 1)), 4, axis=1)
        slides = [slide_of(counts, list("DBCA")), slide_of(counts[::-1], list("CADB"))]
        assert choose_panel(slides, 3).genes == ("A", "B", "C")
        assert choose_panel(slides[::-1], 3) == choose_panel(slides, 3)

    def test_a_gene_renamed_between_annotations_enters_once(self, rng):
        ids = ["ENSG1", "ENSG2"]
        slides = [
            self.varied(rng, ["NEW", "B"], "NEW", ensembl=ids),
            self.varied(rng, ["NEW", "B"], "NEW", ensembl=ids),
            self.varied(rng, ["OLD", "B"], "OLD", ensembl=ids),
            self.varied(rng, ["ENSG1", "ENSG2"], "ENSG1", ensembl=ids),
        ]
        assert choose_panel(slides, 9) == Panel(genes=("NEW", "B"), ensembl=("ENSG1", "ENSG2"))

    def test_nothing_to_choose_from(self, rng):
        with pytest.raises(CorpusError, match="no slide has counts"):
            choose_panel([toy_prepared(rng, counts=False)], 5)
        apart = [slide_of(np.ones((3, 1)), [name]) for name in "ABC"]
        with pytest.raises(CorpusError, match="no gene is measured"):
            choose_panel(apart, 5)


class TestPanelFile:
    def test_round_trip(self, tmp_path):
        panel = panel_of("A", "HLA-A", "AC1.1", ensembl=("ENSG1", "", "ENSG3"))
        panel.save(tmp_path / "genes.txt")
        assert Panel.load(tmp_path / "genes.txt") == panel

    def test_hash_depends_on_genes_and_order(self):
        panels = [panel_of("A", "B"), panel_of("B", "A"), panel_of("A"), panel_of("AB")]
        assert len({panel.hash for panel in panels}) == 4
        assert len(panels[0].hash) == 12
        assert panels[0].hash == panel_of("A", "B").hash

    def test_what_people_write(self, tmp_path):
        path = tmp_path / "mine.csv"
        path.write_text("\ufeff# my genes\r\nA, ENSG1\r\n\r\nB\r\n", encoding="utf-8")
        assert read_panel(path) == panel_of("A", "B", ensembl=("ENSG1", ""))

    @pytest.mark.parametrize(
        ("text", "found"),
        [("", "no gene"), ("A\nB\nA\n", "A is repeated"), ("A,B,C\n", "1 lines"), (",X\n", "1 l")],
    )
    def test_what_is_no_panel(self, tmp_path, text, found):
        path = tmp_path / "genes.txt"
        path.write_text(text)
        with pytest.raises(ConfigError, match=found):
            read_panel(path)
        with pytest.raises(ModelError, match=found):
            Panel.load(path)

    def test_missing_or_not_text(self, tmp_path):
        with pytest.raises(ConfigError, match="missing"):
            read_panel(tmp_path / "none.txt")
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
        with pytest.raises(ConfigError, match="not a text file"):
            read_panel(tmp_path / "binary")


def test_layer_markers_of_a_real_cortex_are_chosen(data):
    h5ad = pytest.importorskip("anndata").read_h5ad(data / "dlpfc" / "151675.h5ad")
    counts, genes, _ = unify_genes(
        sparse.csr_array(h5ad.X).astype(np.int32), h5ad.var["gene_symbol"], h5ad.var_names
    )
    umi = h5ad.obs["total_umi"].to_numpy(np.float64)
    members = neighbors(
        "lattice",
        xy=np.asarray(h5ad.obsm["spatial"], np.float64),
        places=h5ad.obs[["array_row", "array_col"]].to_numpy(np.int32),
        lattice="hex",
        barcodes=h5ad.obs_names.to_numpy(np.str_),
    )
    slide = dataclasses.replace(
        slide_of(np.ones((2, 1)), ["A"]),
        spots=pd.DataFrame({"barcode": h5ad.obs_names, "total_umi": umi}),
        counts=counts,
        genes=genes,
        niches={"lattice": Niche(neighbors=members, boxes=np.zeros((len(umi), 4)), patches=None)},
    )
    chosen = choose_panel([slide, slide], 500).genes
    assert {"MBP", "PLP1", "PCP4", "SNAP25", "MOBP", "HBB", "GFAP", "NEFL"} <= set(chosen)
