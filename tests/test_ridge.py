"""Ridge regression from sums over spots."""

from __future__ import annotations

import numpy as np
import pytest

from st_align.ridge import PENALTIES, choose_alpha, leading_axes, moments, solve, total


def ridge_data(rng, n=60, d=5, g=3):
    x = rng.normal(size=(n, d))
    return x, x @ rng.normal(size=(d, g)) + 0.3 * rng.normal(size=(n, g))


def test_weights_solve_the_ridge_equations(rng):
    x, y = ridge_data(rng)
    w = solve(moments(x, y, np.ones(3, bool)), 0.7)
    expected = np.linalg.solve(x.T @ x / 60 + 0.7 * np.eye(5), x.T @ y / 60)
    np.testing.assert_allclose(w, expected, rtol=1e-9)


def test_the_error_from_sums_is_that_of_predicting_the_fold(rng):
    x, y = ridge_data(rng)
    folds = [slice(0, 20), slice(20, 40), slice(40, 60)]
    measured = np.ones(3, bool)
    parts = [moments(x[f], y[f], measured) for f in folds]
    choice = choose_alpha(parts)
    penalties = PENALTIES * (x**2).sum() / 60
    errors = []
    for alpha in penalties:
        fold_errors = []
        for i, f in enumerate(folds):
            w = solve(total([p for j, p in enumerate(parts) if j != i]), alpha)
            error = ((y[f] - x[f] @ w) ** 2).sum(axis=0) / (y[f] ** 2).sum(axis=0)
            fold_errors.append(error.mean())
        errors.append(np.mean(fold_errors))
    assert choice.error == pytest.approx(min(errors))
    assert choice.alpha == pytest.approx(penalties[int(np.argmin(errors))])


def test_ridge_on_axes_that_span_the_rows_is_ridge_on_the_features(rng):
    x, y = ridge_data(rng, n=30, d=50)
    axes, every = leading_axes([x[:10], x[10:]], 100), np.ones(3, bool)
    assert axes.shape == (50, 30)
    np.testing.assert_allclose(axes.T @ axes, np.eye(30), atol=1e-5)
    short = axes @ solve(moments(x @ axes, y, every), 0.3)
    np.testing.assert_allclose(short, solve(moments(x, y, every), 0.3), atol=1e-4)


def test_of_many_axes_the_first_are_kept(rng):
    x = rng.normal(size=(40, 6)) * np.array([9, 7, 5, 0.1, 0.1, 0])
    axes = leading_axes([x], 3)
    np.testing.assert_allclose(np.abs(axes[:3]).max(axis=0), 1, atol=0.2)
    assert axes.shape == (6, 3)
    assert leading_axes([x], 9).shape == (6, 5)


def test_noise_is_answered_with_the_mean(rng):
    parts = [
        moments(rng.normal(size=(200, 20)), rng.normal(size=(200, 2)), np.ones(2, bool))
        for _ in range(3)
    ]
    choice = choose_alpha(parts)
    assert choice.error > 0.97
    assert np.abs(solve(total(parts), choice.alpha)).max() < 0.05


def test_a_single_fold_leaves_the_mean(rng):
    x, y = ridge_data(rng)
    choice = choose_alpha([moments(x, y, np.ones(3, bool))])
    assert choice == (pytest.approx(PENALTIES[-1] * (x**2).sum() / 60), 1.0)
