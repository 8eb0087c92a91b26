"""A section drawn as haematoxylin and eosin: texture and colour follow domain and programme.

Light is absorbed by two stains: rgb = light x exp(-(h H + e E)) with the concentrations h and e of
each pixel and the colours H, E of the stains, which shift from patient to patient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from st_align.simulate.fields import Field, resize, smooth_noise
from st_align.simulate.section import Section

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
_HAEMATOXYLIN = np.array([0.68, 0.86, 0.34])
_EOSIN = np.array([0.10, 0.62, 0.30])
_UM_PER_PITCH = 100.0
_NUCLEUS_UM = 3.0
"""Radius."""
_RANGES: dict[str, tuple[float, float]] = {
    "nuclei_per_spot": (9.0, 22.0),
    "nucleus_size": (0.85, 1.25),
    "eosin": (0.46, 0.66),
    "fibres": (0.06, 0.24),
    "fibre_turn": (0.0, 1.0),
    "vacuoles": (0.02, 0.10),
}
_NUCLEI_SLOPE, _EOSIN_SLOPE, _FIBRE_SLOPE = 0.35, -0.16, 0.25
"""Log change per sd of the programme."""


@dataclass(frozen=True)
class Tissue:
    """How each domain looks: a value [C] of every key of `_RANGES`."""

    looks: dict[str, Floats]


@dataclass(frozen=True)
class Stain:
    """Absorbance of the two stains at unit concentration, and the light: [3] each."""

    haematoxylin: Floats32
    eosin: Floats32
    light: Floats32


def draw_tissue(rng: np.random.Generator, n_domains: int) -> Tissue:
    """Spread the domains over the range of every property, each in an order of its own."""
    steps = np.linspace(0, 1, n_domains)
    return Tissue(
        {name: low + (high - low) * rng.permutation(steps) for name, (low, high) in _RANGES.items()}
    )


def draw_stain(rng: np.random.Generator, log_sd: float) -> Stain:
    """The stain of a patient's slides."""
    strength = np.exp(rng.normal(0, 1.5 * log_sd, 2))
    tint = np.exp(rng.normal(0, log_sd, (2, 3)))
    light = rng.uniform(0.93, 0.98) * np.exp(rng.normal(0, 0.1 * log_sd, 3))
    colours = (_HAEMATOXYLIN * strength[0] * tint[0], _EOSIN * strength[1] * tint[1], light)
    return Stain(*(np.asarray(colour, np.float32) for colour in colours))


def render(
    rng: np.random.Generator, section: Section, tissue: Tissue, stain: Stain
) -> NDArray[np.uint8]:
    """Draw the section: uint8 [H, W, 3]."""
    from scipy.ndimage import gaussian_filter

    shape, um = section.shape, section.pitch_px / _UM_PER_PITCH
    programme = section.programme_map

    def look(name: str, slope: float = 0.0) -> Field:
        of_domain = gaussian_filter(tissue.looks[name][section.domain_map], 1.5)
        return resize(of_domain * np.exp(slope * programme), shape)

    inside = resize(gaussian_filter(section.tissue_map.astype(np.float32), 1.0), shape).clip(0, 1)
    fray = smooth_noise(rng, shape, 8 * um)
    solid = 1 / (1 + np.exp(-(inside - 0.5 + 0.12 * fray) * 25))
    lumen = smooth_noise(rng, shape, 16 * um)
    solid *= 1 / (1 + np.exp((lumen - _normal_quantile(1 - look("vacuoles"))) * 8))

    nuclei = _nuclei(rng, look("nuclei_per_spot", _NUCLEI_SLOPE) * solid, section, tissue, um)
    fibres = _fibres(rng, shape, look("fibre_turn"), um)
    grain = rng.standard_normal(shape, dtype=np.float32)
    eosin = look("eosin", _EOSIN_SLOPE) * (1 + look("fibres", _FIBRE_SLOPE) * fibres)
    eosin *= (1 + 0.06 * grain) * (1 - 0.6 * nuclei)
    haematoxylin = 0.10 + 0.03 * smooth_noise(rng, shape, 25 * um) + 0.85 * nuclei
    absorbed = np.multiply.outer(
        solid * haematoxylin.clip(0), stain.haematoxylin.astype(np.float32)
    )
    absorbed += np.multiply.outer(solid * eosin.clip(0), stain.eosin.astype(np.float32))
    rgb = 255 * stain.light * np.exp(-absorbed) + 1.5 * grain[..., None]
    return np.asarray(rgb.clip(0, 255), np.uint8)


def _nuclei(
    rng: np.random.Generator, per_spot: Field, section: Section, tissue: Tissue, um: float
) -> Field:
    """[H, W] 0..1: discs with soft edges around random points of the given density."""
    from scipy.ndimage import gaussian_filter

    spot_px = np.pi * (27.5 * um) ** 2
    is_nucleus = rng.random(per_spot.shape, dtype=np.float32) < per_spot / spot_px
    sizes = resize(tissue.looks["nucleus_size"][section.domain_map], section.shape)
    is_large = rng.random(per_spot.shape, dtype=np.float32) < (sizes - 0.85) / 0.4
    total = np.zeros(per_spot.shape, np.float32)
    for radius, chosen in ((0.85, is_nucleus & ~is_large), (1.25, is_nucleus & is_large)):
        sigma = max(0.5, radius * _NUCLEUS_UM * um / 1.5)
        tone = rng.uniform(0.7, 1.3, per_spot.shape).astype(np.float32)
        peak = 2 * np.pi * sigma**2
        total += gaussian_filter(chosen * tone, sigma, truncate=3.0) * np.float32(peak)
    return np.asarray(
        1 / (1 + np.exp(-(total - 0.45) * 9)) - 1 / (1 + np.exp(0.45 * 9)), np.float32
    )


def _fibres(rng: np.random.Generator, shape: tuple[int, int], turn: Field, um: float) -> Field:
    """[H, W] of sd about 1: streaks along x where `turn` is 0, along y where it is 1."""
    from scipy.ndimage import gaussian_filter

    noise = rng.standard_normal(shape, dtype=np.float32)
    thin, long = max(0.5, 1.6 * um), 11 * um
    along_x = gaussian_filter(noise, (thin, long), truncate=2.5)
    along_y = gaussian_filter(noise, (long, thin), truncate=2.5)
    mixed = (1 - turn) * along_x + turn * along_y
    return np.asarray(mixed / along_x.std(), np.float32)


def _normal_quantile(share: Field) -> Field:
    from scipy.special import ndtri

    return np.asarray(ndtri(share.clip(0.5, 0.995)), np.float32)
