from __future__ import annotations

import numpy as np

from st_align.colour import N_STATISTICS, colour_statistics


def test_statistics_of_a_patch_of_two_colours(rng):
    patches = np.zeros((3, 4, 4, 3), np.uint8)
    patches[:, :2] = (100, 200, 50)
    patches[1] = rng.integers(0, 256, (4, 4, 3))
    found = colour_statistics(patches)
    assert found.shape == (3, N_STATISTICS)
    np.testing.assert_allclose(found[0, :3], [50, 100, 25])
    np.testing.assert_allclose(found[0, 3:6], [50, 100, 25])
    density = -np.log((np.array([[100, 200, 50], [0, 0, 0]]) + 1) / 256)
    np.testing.assert_allclose(found[0, 6:9], density.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found[0, 9:12], density.std(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found[0, 12:15], 0)
    np.testing.assert_allclose(found[0, 18:21], [100, 200, 50])
    np.testing.assert_array_equal(found[0], found[2])


def test_many_patches_are_read_in_blocks(rng):
    patches = rng.integers(0, 256, (1100, 2, 2, 3), dtype=np.uint8)
    whole = colour_statistics(patches)
    np.testing.assert_allclose(whole[1000:], colour_statistics(patches[1000:]), rtol=1e-6)
