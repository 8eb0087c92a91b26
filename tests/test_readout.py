"""Readouts: axes of training slides, learned and linear, and the spots kept for reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from st_align.errors import ModelError
from st_align.keys import LINEAR_USES
from st_align.linear import LinearAxes, centred, coordinates, fit_linear, niche_facts
from st_align.readout import Readouts
from toy_readouts import readouts_of, toy_niches, toy_vectors


def test_readouts_are_the_pooled_principal_axes_of_centred_slides(rng):
    slides = [toy_vectors(rng), toy_vectors(rng, n=30)]
    readouts = readouts_of(slides)
    centred = np.concatenate([s.t - s.t.mean(axis=0) for s in slides]).astype(np.float64)
    _, _, expected = np.linalg.svd(centred, full_matrices=False)
    axes = readouts.axes["gene"]
    np.testing.assert_allclose(np.abs(np.sum(axes * expected.T, axis=0)), 1, atol=1e-5)
    assert (axes[np.abs(axes).argmax(axis=0), range(4)] > 0).all()
    scores = readouts.apply("gene", slides[0])
    np.testing.assert_allclose(scores.mean(axis=0), 0, atol=1e-6)
    assert scores.dtype == np.float32
    assert readouts.axes["image"].shape == (8, 8)
    assert readouts.axes["spot+niche"].shape == (16, 16)


def test_a_slide_offset_changes_no_readout(rng):
    slide = toy_vectors(rng)
    readouts = readouts_of([slide])
    stained = dataclasses.replace(slide, r=slide.r + 3, e=slide.e - 5)
    np.testing.assert_allclose(
        readouts.apply("image", slide), readouts.apply("image", stained), atol=1e-5
    )


def test_readouts_keep_at_most_32_axes_and_drop_those_that_do_not_vary(rng):
    wide = toy_vectors(rng, n=100, d=40)
    flat = dataclasses.replace(wide, t=wide.t[:, :1] * np.ones(40, np.float32))
    assert readouts_of([wide]).axes["gene"].shape == (40, 32)
    assert readouts_of([flat]).axes["gene"].shape == (40, 1)


def test_a_modality_that_no_training_slide_has_gives_no_readout(rng):
    slide = toy_vectors(rng, image=False)
    readouts = readouts_of([slide])
    assert set(readouts.axes) == {"gene", "spot", "niche", "spot+niche"}
    with pytest.raises(ModelError, match=r"(?s)no readout for 'image'.*gene"):
        readouts.apply("image", slide)
    with pytest.raises(ModelError, match="--resume"):
        Readouts({}).apply("gene", slide)


def test_rows_without_the_modality_read_out_as_the_slide_mean(rng):
    slide = toy_vectors(rng)
    slide.has_counts[:10] = False
    slide.t[:10] = 0
    readouts = readouts_of([slide])
    scores = readouts.apply("gene", slide)
    assert (scores[:10] == 0).all()
    np.testing.assert_allclose(scores[10:].mean(axis=0), 0, atol=1e-6)


class Rows:
    """Niche expression held in memory."""

    def __init__(self, values):
        self.values = values.astype(np.float32)

    def read(self, rows):
        return (self.values[rows],)


def read(axes, values, use):
    return coordinates(axes, Rows(values), niche_facts(Rows(values), len(values)), use)


def planted(rng, n=400, genes=40, axes=3):
    """Expression on a few axes, and noise beside them."""
    basis, _ = np.linalg.qr(rng.normal(size=(genes, axes)))
    scores = rng.normal(size=(n, axes)) * np.array([3.0, 2.0, 1.5])[:axes]
    return scores @ basis.T + 0.1 * rng.normal(size=(n, genes)), scores


def test_linear_axes_are_those_of_pca_and_the_prior_hardly_shrinks(rng):
    values, _ = planted(rng)
    axes = fit_linear([values.astype(np.float32)], "linear", 3)
    _, sizes, expected = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(np.sum(axes.axes * expected[:3].T, axis=0)), 1, atol=1e-5)
    np.testing.assert_allclose(axes.variances, sizes[:3] ** 2 / len(values), rtol=1e-4)
    assert axes.noise == pytest.approx(0.01, rel=0.1)
    scores = read(axes, values, "linear")
    plain = (values - values.mean(axis=0)) @ axes.axes
    np.testing.assert_allclose(scores, plain, rtol=0.02, atol=0.02)


def test_genes_not_measured_leave_the_scale_of_the_scores(rng):
    values, _ = planted(rng)
    axes = fit_linear([values.astype(np.float32)], "linear", 3)
    whole = read(axes, values, "linear")
    half = values.copy()
    half[:, ::2] = 0
    part = read(axes, half, "linear")
    for k in range(3):
        slope = part[:, k] @ whole[:, k] / (whole[:, k] @ whole[:, k])
        assert slope == pytest.approx(1, abs=0.05)
    shrunk = ((half - half.mean(axis=0)) @ axes.axes).std(axis=0)
    assert (shrunk < 0.8 * whole.std(axis=0)).all()


def test_training_slides_count_for_the_pairs_of_genes_they_measured(rng):
    values, _ = planted(rng, n=2000)
    one, other = values[:1000].copy(), values[1000:].copy()
    one[:, :4], other[:, 36:] = 0, 0
    parts = [v.astype(np.float32) for v in (one, other)]
    joint, full = (
        fit_linear(parts, "linear", 3),
        fit_linear([values.astype(np.float32)], "linear", 3),
    )
    # Pairs that no slide measured together are 0, so the space is near, not equal.
    angles = np.linalg.svd(joint.axes.T @ full.axes, compute_uv=False)
    assert angles.min() > 0.8


def test_scaled_axes_do_not_know_how_loud_a_gene_is(rng):
    values, _ = planted(rng)
    loud = values * np.where(np.arange(40) == 7, 50.0, 1.0)
    plain = [fit_linear([v.astype(np.float32)], "linear", 3) for v in (values, loud)]
    scaled = [fit_linear([v.astype(np.float32)], "linear-scaled", 3) for v in (values, loud)]
    assert abs(plain[1].axes[7, 0]) > 0.99
    np.testing.assert_allclose(np.abs(scaled[0].axes[7]), np.abs(scaled[1].axes[7]), atol=0.05)


def test_blocks_give_what_one_pass_gives(rng, monkeypatch):
    values, _ = planted(rng)
    for use in LINEAR_USES:
        axes = fit_linear([values.astype(np.float32)], use, 3)
        whole = read(axes, values, use)
        monkeypatch.setattr("st_align.linear._BLOCK", 7)
        np.testing.assert_allclose(read(axes, values, use), whole, atol=1e-6)
        monkeypatch.undo()
        np.testing.assert_allclose(
            centred(values.astype(np.float32), use) @ axes.projection(np.ones(40, bool)),
            whole,
            atol=1e-5,
        )


def test_spots_of_the_training_slides_stay_on_the_axes(rng):
    values = [planted(rng, n=n)[0].astype(np.float32) for n in (1500, 900)]
    values[1][:, :5] = 0
    for use in LINEAR_USES:
        axes = fit_linear(values, use, 3)
        every = np.concatenate([read(axes, v, use) for v in values])
        assert axes.spots.shape == (2000, 3)
        np.testing.assert_allclose(axes.spots[[0, -1]], every[[0, -1]], atol=1e-4)
        np.testing.assert_allclose(axes.spots.std(axis=0), every.std(axis=0), rtol=0.05)
        few = fit_linear([values[0][:30]], use, 3)
        assert few.spots.shape == (30, 3)


def test_a_slide_without_the_panel_reads_out_as_nothing(rng):
    axes = LinearAxes(
        axes=np.eye(5, 2, dtype=np.float32), variances=np.array([2, 1], np.float32), noise=0.1
    )
    assert not read(axes, np.zeros((6, 5)), "linear-scaled").any()


def test_readouts_keep_linear_axes_where_there_are_counts(rng):
    slide, niches = toy_vectors(rng), toy_niches(rng)
    assert set(readouts_of([slide], niches).linear) == set(LINEAR_USES)
    assert not readouts_of([slide]).linear
