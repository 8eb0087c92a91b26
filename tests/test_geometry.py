"""Scale, neighbours and niches: parity fixtures, and properties that hold on any lattice."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from st_align import geometry
from st_align.errors import ConfigError, SlideError
from st_align.slide import Lattice
from toys import HEX_RING, hex_places, hex_xy

PITCH = {"hex": 100.0, "square": 200.0}
LATTICES: dict[str, Lattice] = {"hex": "hex", "square": "square", "three": "hex"}


@pytest.fixture
def niche(golden):
    given, wanted = (dict(np.load(golden / "niche" / f"{n}.npz")) for n in ("inputs", "outputs"))

    def case(name: str) -> tuple[dict, dict]:
        parts = [
            {k.removeprefix(f"{name}."): v for k, v in z.items() if k.startswith(f"{name}.")}
            for z in (given, wanted)
        ]
        parts[0]["places"] = np.c_[parts[0]["array_row"], parts[0]["array_col"]]
        return parts[0], parts[1]

    return case


@pytest.mark.parametrize("name", LATTICES)
class TestGolden:
    def test_scale(self, niche, name):
        given, wanted = niche(name)
        pitch_um = float(given["nominal_pitch_um"])
        scale = geometry.fit_scale(given["xy"], given["places"], LATTICES[name], pitch_um)
        free = geometry.fit_scale(given["xy"], None, LATTICES[name], pitch_um)
        assert scale.pitch_px == pytest.approx(wanted["pitch_px"], rel=1e-12)
        assert scale.um_per_px == pytest.approx(wanted["um_per_px"], rel=1e-12)
        assert free.pitch_px == pytest.approx(wanted["pitch_px_without_places"], rel=1e-12)

    @pytest.mark.parametrize("key", ["k3", "k3_without_places", "lattice"])
    def test_neighbors(self, niche, name, key):
        given, wanted = niche(name)
        found = geometry.neighbors(
            key.removesuffix("_without_places"),
            xy=given["xy"],
            places=None if "without" in key else given["places"],
            lattice=LATTICES[name],
            barcodes=given["barcode"],
        )
        np.testing.assert_array_equal(found, wanted[f"neighbors_{key}"])
        assert found.dtype == np.int32

    @pytest.mark.parametrize("spec", ["k3", "lattice"])
    def test_boxes_and_expression(self, niche, name, spec):
        given, wanted = niche(name)
        members = wanted[f"neighbors_{spec}"]
        squares = geometry.spot_boxes(
            given["xy"], float(given["spot_diameter_um"] / wanted["um_per_px"])
        )
        expression = np.log1p(given["counts"] / given["total_umi"][:, None] * 1e4)
        np.testing.assert_array_equal(squares, wanted["spot_box"])
        boxes = geometry.niche_boxes(members, squares)
        np.testing.assert_array_equal(boxes, wanted[f"niche_box_{spec}"])
        means = geometry.ring_mean(expression, members)
        np.testing.assert_allclose(means, wanted[f"niche_expression_{spec}"], rtol=1e-14)


def literal(
    spec: str, places: np.ndarray, lattice: Lattice, barcodes: np.ndarray
) -> list[list[int]]:
    """For each spot, all others in the order of (distance, row, column, barcode)."""
    k, out = geometry.parse_niche_spec(spec), []
    for i, here in enumerate(places.tolist()):
        keys = []
        for j, there in enumerate(places.tolist()):
            dr, dc = there[0] - here[0], there[1] - here[1]
            ring = (dr, dc) in geometry.RING[lattice]
            if i != j and (k is not None or ring):
                far = (3 if lattice == "hex" else 1) * dr**2 + dc**2
                keys.append((far, *there, str(barcodes[j]), j))
        out.append([i, *(key[-1] for key in sorted(keys)[:k])])
    return out


@st.composite
def tissues(draw) -> tuple[Lattice, np.ndarray, np.ndarray]:
    """Lattice, places (holes, rows in any order), barcodes."""
    lattice: Lattice = draw(st.sampled_from(["hex", "square"]))
    rows, cols = draw(st.integers(1, 7)), draw(st.integers(2, 7))
    grid = hex_places(rows, cols) if lattice == "hex" else np.argwhere(np.ones((rows, cols)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kept = rng.permutation(len(grid))[: draw(st.integers(2, len(grid)))]
    places = grid[kept].astype(np.int32) + draw(st.integers(-3, 100))
    return lattice, places, np.array([f"b{i:x}" for i in rng.permutation(len(kept))])


def pixels(lattice: Lattice, places: np.ndarray) -> np.ndarray:
    return hex_xy(places, 30.0) if lattice == "hex" else places[:, ::-1] * 30.0


def moved(xy: np.ndarray, degrees: float) -> np.ndarray:
    turn = np.deg2rad(degrees)
    return xy @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) - 77.7


SPECS = st.sampled_from(["k1", "k3", "k6", "k18", "lattice"])


@settings(max_examples=60, deadline=None)
@given(tissues(), SPECS)
def test_members_are_those_of_a_literal_search(tissue, spec):
    lattice, places, barcodes = tissue
    xy = pixels(lattice, places)
    found = geometry.neighbors(spec, xy=xy, places=places, lattice=lattice, barcodes=barcodes)
    wanted = literal(spec, places, lattice, barcodes)
    k = geometry.parse_niche_spec(spec) or len(geometry.RING[lattice])
    assert found.shape == (len(places), k + 1)
    assert found.tolist() == [row + [-1] * (k + 1 - len(row)) for row in wanted]


@settings(max_examples=60, deadline=None)
@given(tissues(), SPECS, st.booleans())
def test_a_niche_has_its_spot_and_distinct_members(tissue, spec, with_places):
    lattice, places, barcodes = tissue
    if spec == "lattice" and not with_places and lattice == "square":
        return
    found = geometry.neighbors(
        spec,
        xy=pixels(lattice, places),
        places=places if with_places else None,
        lattice=lattice,
        barcodes=barcodes,
    )
    assert (found[:, 0] == np.arange(len(places))).all()
    for row in found.tolist():
        members = [i for i in row if i >= 0]
        assert len(set(members)) == len(members)
        assert row == members + [-1] * (len(row) - len(members))
    if spec.startswith("k"):
        assert ((found >= 0).sum(axis=1) == min(found.shape[1], len(places))).all()


@settings(max_examples=60, deadline=None)
@given(tissues(), SPECS, st.booleans(), st.integers(0, 2**32))
def test_members_follow_a_shuffle_and_not_a_move(tissue, spec, with_places, seed):
    lattice, places, barcodes = tissue
    if spec == "lattice" and not with_places and lattice == "square":
        return
    xy = pixels(lattice, places)

    def search(rows: np.ndarray, move: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return geometry.neighbors(
            spec,
            xy=move(xy[rows]),
            places=places[rows] if with_places else None,
            lattice=lattice,
            barcodes=barcodes[rows],
        )

    straight = search(np.arange(len(xy)), lambda p: p)
    order = np.random.default_rng(seed).permutation(len(xy))
    shuffled = search(order, lambda p: p)
    back = np.where(shuffled >= 0, order[shuffled], -1)
    np.testing.assert_array_equal(back, straight[order])
    degrees = 60 if lattice == "hex" else 90
    np.testing.assert_array_equal(search(np.arange(len(xy)), lambda p: moved(p, degrees)), straight)


def test_an_isolated_spot_gets_its_nearest_however_far():
    places = np.array([(0, 0), (0, 2), (1, 1), (900, 900)], np.int32)
    found = geometry.neighbors(
        "k2",
        xy=hex_xy(places, 10.0),
        places=places,
        lattice="hex",
        barcodes=np.array(list("abcd")),
    )
    assert found[3].tolist() == [3, 2, 1]


def test_spots_on_one_place_are_ordered_by_barcode():
    places = np.array([(0, 0), (0, 0), (0, 0), (0, 2)], np.int32)
    found = geometry.neighbors(
        "k3",
        xy=hex_xy(places, 10.0),
        places=places,
        lattice="hex",
        barcodes=np.array(["d", "b", "c", "a"]),
    )
    assert found.tolist() == [[0, 1, 2, 3], [1, 2, 0, 3], [2, 1, 0, 3], [3, 1, 2, 0]]


def test_many_spots_on_one_point_are_still_sorted_out(rng):
    xy = np.r_[np.zeros((60, 2)), rng.uniform(50, 500, (100, 2))]
    barcodes = np.array([f"{i:03}" for i in range(160)])
    found = geometry.neighbors("k3", xy=xy, places=None, lattice="hex", barcodes=barcodes)
    assert found[:60, 1:].max() == 3


def test_ring_without_places_ends_at_1_3_pitches():
    places = hex_places(5, 5)
    xy = hex_xy(places, 30.0) + np.random.default_rng(0).uniform(-2, 2, (25, 2))
    barcodes = np.array([f"{i:02}" for i in range(25)])
    free = geometry.neighbors("lattice", xy=xy, places=None, lattice="hex", barcodes=barcodes)
    by_place = geometry.neighbors("lattice", xy=xy, places=places, lattice="hex", barcodes=barcodes)
    assert np.array_equal(np.sort(free, axis=1), np.sort(by_place, axis=1))


def test_lattice_ring_is_mutual():
    places = hex_places(6, 6)
    found = geometry.neighbors(
        "lattice",
        xy=hex_xy(places, 30.0),
        places=places,
        lattice="hex",
        barcodes=np.arange(36).astype(str),
    )
    together = geometry.incidence(found, 36).toarray()
    assert np.array_equal(together, together.T)
    assert set(geometry.RING["hex"]) == set(HEX_RING)


@pytest.mark.parametrize("places", [None, "given"])
def test_time_grows_with_the_spots(places):
    side = 224
    grid = hex_places(side, side)
    rng = np.random.default_rng(0)
    grid = grid[rng.permutation(len(grid))]
    barcodes = np.array([f"{i:x}" for i in rng.permutation(len(grid))])
    start = time.perf_counter()
    for spec in ("k3", "lattice"):
        found = geometry.neighbors(
            spec,
            xy=hex_xy(grid, 50.0) + rng.normal(size=grid.shape),
            places=grid if places else None,
            lattice="hex",
            barcodes=barcodes,
        )
        assert (found[:, 1] >= 0).all()
    assert time.perf_counter() - start < 8  # about 0.5 s; all pairs would take minutes and 20 GB


def test_scale_without_touching_places_uses_the_distance_on_the_lattice():
    places = np.array([(0, 0), (0, 6), (9, 3)], np.int32)
    scale = geometry.fit_scale(hex_xy(places, 40.0), places, "hex", 100.0)
    assert scale.pitch_px == pytest.approx(40.0)
    assert scale.um_per_px == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("xy", "places"),
    [
        (np.zeros((1, 2)), None),
        (np.zeros((3, 2)), None),
        (np.zeros((3, 2)), np.zeros((3, 2), np.int32)),
        (np.ones((2, 2)), np.array([(0, 0), (0, 2)], np.int32)),
        (np.eye(2), np.array([(0, 0), (0, 2**30)], np.int32)),
    ],
)
def test_no_scale_is_an_error(xy, places):
    with pytest.raises(SlideError):
        geometry.fit_scale(xy, places, "hex", 100.0)


@pytest.mark.parametrize("spec", ["", "k", "k0", "k03", "k-1", "hex", "K3", "lattice ", "k9999"])
def test_unknown_specs_are_refused(spec):
    with pytest.raises(ConfigError, match="no niche is called"):
        geometry.parse_niche_spec(spec)


def test_square_lattice_needs_places():
    with pytest.raises(ConfigError, match="k4"):
        geometry.neighbors(
            "lattice",
            xy=np.eye(3, 2),
            places=None,
            lattice="square",
            barcodes=np.array(list("abc")),
        )


def test_ring_mean_leaves_out_absent_and_invalid_members():
    values = np.array([[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]], np.float32)
    members = np.array([[0, 1, -1], [1, 2, 0], [2, -1, -1]], np.int32)
    mean = geometry.ring_mean(values, members, np.array([True, True, False]))
    np.testing.assert_array_equal(mean, [[2, 3], [2, 3], [0, 0]])
    assert mean.dtype == np.float32
    np.testing.assert_array_equal(
        geometry.ring_mean(values.astype(np.float16), members[:1]), mean[:1]
    )


def test_the_spot_itself_may_count_for_more_than_its_neighbours():
    values = np.array([[1.0, 2.0], [3.0, 4.0], [8.0, 12.0]], np.float32)
    members = np.array([[0, 1, 2], [1, 2, -1], [-1, 0, 1]], np.int32)
    valid = np.array([True, False, True])
    mean = geometry.ring_mean(values, members, own=3.0)
    np.testing.assert_allclose(mean, [[14 / 5, 22 / 5], [17 / 4, 24 / 4], [2, 3]])
    unlit = geometry.ring_mean(values, members, valid, own=3.0)
    np.testing.assert_allclose(unlit, [[11 / 4, 18 / 4], [8, 12], [1, 2]])
    weights = [geometry.own_weight(pitch) for pitch in (8, 100, 200)]
    np.testing.assert_allclose(weights, [1.003, 1.649, 7.389], atol=5e-4)


@pytest.mark.parametrize("k", [3, 6])
def test_niches_are_those_of_equations_1_and_2(rng: np.random.Generator, k: int) -> None:
    places = hex_places(7, 8)[rng.permutation(56)[:40]]
    xy, barcodes = hex_xy(places, 100.0), np.array([f"b{i}" for i in range(40)])
    found = geometry.neighbors(f"k{k}", xy=xy, places=places, lattice="hex", barcodes=barcodes)
    values = rng.normal(size=(40, 5))
    means = geometry.ring_mean(values, found)
    for n in range(40):
        literal = reference.niche(xy, n, k)
        near = [reference.distance(xy[n], xy[m]) for m in found[n]]
        # Ties are broken by place, which changes the members but not how near they are.
        np.testing.assert_allclose(near, [reference.distance(xy[n], xy[m]) for m in literal])
        np.testing.assert_allclose(means[n], reference.niche_expression(values, found[n].tolist()))
