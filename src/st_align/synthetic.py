"""Sections that never lived: tissue, domains, a programme, counts and histology, all with truth.

A cohort has one atlas: what each domain and the programme do to genes and to the stain. Every
patient bends it (batch effect, stain), every section cuts it along other curves.

    tissue     hexagonal lattice, ragged outline, holes
    domain     layers, or shells around a centre, of a warped depth
    programme  a smooth field in [-1, 1] that crosses the domains
    counts     NB(library x softmax(base + domain + programme + patient + section))
    histology  haematoxylin and eosin in optical density; texture by domain and programme

The constants were set once, from the linear baselines alone, and stay as they are.

Shape letters: N spots, G genes, C domains; lengths in pitches (the distance of two spots).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import ndtr

from st_align.expression import Genes

Floats = NDArray[np.float64]

N_GENES = 1500
MAX_DOMAINS = 7
EMPTY_SHARE = 0.02
LIBRARY = (400.0, 4000.0)
"""Molecules of a spot, from the poorest to the richest."""
_INVERSE_DISPERSION = 2.0
_DOMAIN_GENES, _DOMAIN_EFFECT = 0.3, 0.5
_PROGRAMME_GENES, _PROGRAMME_EFFECT = 0.2, 0.8
_PATIENT_EFFECT, _SECTION_EFFECT = 0.3, 0.1
_BORDER = 0.02
"""Depth over which two domains mix."""
_HOLES = 3

_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
"""Optical density in red, green and blue of haematoxylin and of eosin."""
_STAIN_SHIFT, _STAIN_STRENGTH = 0.05, 0.15

# Symbol and the digits of its Ensembl id.
_HUMAN = """
SNAP25:0132639 MBP:0197971 PCP4:0183036 MOBP:0168314 GFAP:0131095 CCK:0187094 PVALB:0100362
NPY:0122585 HBB:0244734 IGKC:0211592 FABP7:0164434 PLP1:0123560 AQP4:0171885 RELN:0189056
CUX2:0111249 LAMP5:0125869 RORB:0198963 HPCAL1:0115756 ENC1:0171617 NEFL:0277586 NEFM:0104722
NEFH:0100285 SYT1:0067715 SST:0157005 VIP:0146469 TMSB10:0034510 CALM1:0198668 KRT17:0128422
CLDN5:0184113 FABP4:0170323 TRABD2A:0186854 FREM3:0183090 CARTPT:0164326 ADCYAP1:0141433
SLC17A7:0104888 GAD1:0128683 GAD2:0136750 CNP:0173786 MAG:0105695 MOG:0204655 VIM:0026025
ACTB:0075624 GAPDH:0111640 TUBA1A:0167552 STMN2:0104435 UCHL1:0154277 THY1:0154096
OLFM1:0130558 NRGN:0154146 CAMK2A:0070808 VSNL1:0163032 KRT19:0171345 COL1A1:0108821
COL1A2:0164692 COL3A1:0168542 ACTA2:0107796 TAGLN:0149591 CD74:0019582 LYZ:0090382
CD3D:0167286 MS4A1:0156738 JCHAIN:0132465 MALAT1:0251562 HSP90AA1:0080824 HSPA8:0109971
JUN:0177606 FOS:0170345 EGR1:0120738 S100B:0160307 SLC1A2:0110436 ATP1A3:0105409 TF:0091513
PENK:0181195 TAC1:0006128 SYNPR:0163630 TBR1:0136535 BCL11B:0127152 FEZF2:0153266
MEF2C:0081189 GRIA2:0120251 SATB2:0119042 AQP1:0240583 DCN:0011465 LUM:0139329 MGP:0111341
SPP1:0118785 FLT1:0102755 VWF:0110799
"""


class _Look(NamedTuple):
    """How a domain is stained."""

    eosin: float
    nuclei: float
    """Share of the area that they cover."""
    coarse: bool
    """Large nuclei."""
    fibre: float
    """Depth of the stripes; 0 for none."""
    turn: float
    """Their angle."""
    wave: float
    """Their length in pitches."""


_LOOKS = (
    _Look(0.22, 0.03, False, 0.05, 0.3, 0.30),
    _Look(0.30, 0.14, False, 0.00, 0.0, 0.30),
    _Look(0.26, 0.08, True, 0.06, 1.2, 0.22),
    _Look(0.36, 0.22, False, 0.03, 0.9, 0.35),
    _Look(0.32, 0.12, True, 0.10, 2.0, 0.18),
    _Look(0.44, 0.06, False, 0.12, 2.6, 0.26),
    _Look(0.52, 0.04, True, 0.16, 0.6, 0.16),
)


class Field(NamedTuple):
    """A smooth random function of the plane, mean 0 and variance about 1."""

    waves: Floats
    """[M, 2]"""
    phases: Floats
    """[M]"""

    def at(self, xy: NDArray[np.floating]) -> Floats:
        """Values [...] at points [..., 2], in pitches."""
        angles = xy @ self.waves.T + self.phases
        value: Floats = np.cos(angles).sum(axis=-1) * np.sqrt(2 / len(self.phases))
        return value


@dataclass(frozen=True)
class Atlas:
    """What a cohort has in common."""

    genes: Genes
    base: Floats
    """[G] log abundance."""
    domains: Floats
    """[C, G]"""
    programme: Floats
    """[G]"""


@dataclass(frozen=True)
class Patient:
    """What the sections of one patient have in common."""

    id: str
    effect: Floats
    """[G] added to the log abundance."""
    stains: Floats
    """[2, 3] optical densities."""
    n_domains: int


@dataclass(frozen=True)
class Anatomy:
    """Domain and programme as functions of the plane."""

    kind: Literal["layers", "shells"]
    origin: Floats
    direction: Floats
    size: float
    warp: Field
    edges: Floats
    """[C - 1] depths in increasing order."""
    activity: Field

    def depth(self, xy: NDArray[np.floating]) -> Floats:
        """0 to 1 about, at points [..., 2]."""
        away = (xy - self.origin) / self.size
        if self.kind == "layers":
            straight = away @ self.direction + 0.5
        else:
            straight = 1.7 * np.linalg.norm(away * (1 + 0.3 * self.direction), axis=-1)
        depth: Floats = straight + 0.06 * self.warp.at(xy)
        return depth

    def programme(self, xy: NDArray[np.floating]) -> Floats:
        """-1 to 1 at points [..., 2]."""
        return np.asarray(np.tanh(self.activity.at(xy)))


@dataclass(frozen=True)
class Tissue:
    """Where the section is: a rounded rectangle with a ragged outline and holes."""

    centre: Floats
    half: Floats
    ragged: Field
    holes: Floats
    """[H, 3] x, y, radius."""
    limit: float

    def margin(self, xy: NDArray[np.floating]) -> Floats:
        """Above 0 inside, at points [..., 2]."""
        away = np.linalg.norm((xy - self.centre) / self.half, ord=4, axis=-1)
        outside = away + 0.04 * self.ragged.at(xy)
        for x, y, radius in self.holes:
            from_hole = np.hypot(xy[..., 0] - x, xy[..., 1] - y)
            outside = np.maximum(outside, 3 - 2 * from_hole / radius)
        return self.limit - outside


@dataclass(frozen=True)
class Section:
    """One slide and its truth."""

    id: str
    patient: Patient
    tissue: Tissue
    anatomy: Anatomy
    lattice: NDArray[np.int32]
    """[M, 2] array_row, array_col of the whole capture area."""
    in_tissue: NDArray[np.bool_]
    """[M], N of them true."""
    domain: NDArray[np.int64]
    """[N]"""
    programme: Floats
    """[N]"""
    counts: sparse.csr_array
    """[N, G] int32"""

    @property
    def places(self) -> NDArray[np.int32]:
        """[N, 2] of the spots in tissue."""
        return self.lattice[self.in_tissue]


def in_pitches(places: NDArray[np.integer]) -> Floats:
    """Places [N, 2] array_row, array_col to points [N, 2] x, y, one pitch from the border."""
    row, col = places.T.astype(np.float64)
    return np.stack([col / 2 + 1, row * np.sqrt(3) / 2 + 1], axis=1)


def draw_atlas(rng: np.random.Generator) -> Atlas:
    """Genes of a cohort and what moves them."""
    moved = rng.random(N_GENES) < _DOMAIN_GENES
    # Neighbouring domains resemble each other: half of a domain's profile is a walk.
    walk = np.cumsum(rng.normal(0, 1, (MAX_DOMAINS, N_GENES)), axis=0) / np.sqrt(MAX_DOMAINS)
    own = rng.normal(0, 1, (MAX_DOMAINS, N_GENES))
    driven = rng.random(N_GENES) < _PROGRAMME_GENES
    return Atlas(
        genes=_genes(),
        base=rng.normal(0, 1.2, N_GENES),
        domains=_DOMAIN_EFFECT * moved * (walk + own) / np.sqrt(2),
        programme=_PROGRAMME_EFFECT * driven * rng.normal(0, 1, N_GENES),
    )


def draw_patient(id: str, rng: np.random.Generator) -> Patient:
    """Batch effect, stain and number of domains (5 to 7) of a patient."""
    stains = _STAINS + rng.normal(0, _STAIN_SHIFT, _STAINS.shape)
    strength = np.exp(rng.normal(0, _STAIN_STRENGTH, (2, 1)))
    return Patient(
        id=id,
        effect=rng.normal(0, _PATIENT_EFFECT, N_GENES),
        stains=np.maximum(stains, 0.02) * strength,
        n_domains=int(rng.integers(5, MAX_DOMAINS + 1)),
    )


def draw_section(
    id: str, atlas: Atlas, patient: Patient, n_spots: int, rng: np.random.Generator
) -> Section:
    """A section with `n_spots` spots in tissue."""
    lattice, tissue = _tissue(n_spots, rng)
    in_tissue = tissue.margin(in_pitches(lattice)) > 0
    xy = in_pitches(lattice[in_tissue])
    anatomy = _anatomy(xy, patient.n_domains, rng)
    depth, programme = anatomy.depth(xy), anatomy.programme(xy)
    log_mean = atlas.base + patient.effect + rng.normal(0, _SECTION_EFFECT, N_GENES)
    log_mean = log_mean + _shares(depth, anatomy.edges) @ atlas.domains[: patient.n_domains]
    log_mean = log_mean + programme[:, None] * atlas.programme
    return Section(
        id=id,
        patient=patient,
        tissue=tissue,
        anatomy=anatomy,
        lattice=lattice,
        in_tissue=in_tissue,
        domain=np.digitize(depth, anatomy.edges),
        programme=programme,
        counts=_counts(log_mean, _library(xy, rng), rng),
    )


def paint(section: Section, pitch_px: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Histology of the capture area, RGB [H, W, 3], with `pitch_px` pixels between spots."""
    from scipy.ndimage import gaussian_filter
    from scipy.special import ndtri

    anatomy = section.anatomy
    corner = in_pitches(section.lattice).max(axis=0) + 1
    width, height = np.ceil(corner * pitch_px).astype(int).tolist()
    step = max(1, round(pitch_px / 6))
    axes = [np.arange(0, side + step, step) / pitch_px for side in (width, height)]
    grid = np.stack(np.meshgrid(*axes), axis=-1)

    def smooth(values: Floats) -> NDArray[np.float32]:
        return _enlarged(values, step)[:height, :width]

    def speckle(pitches: float) -> NDArray[np.float32]:
        noise = rng.standard_normal((height, width), np.float32)
        blurred = gaussian_filter(noise, pitches * pitch_px)
        return np.asarray(blurred / blurred.std())

    domain = np.digitize(smooth(anatomy.depth(grid)), anatomy.edges)
    programme, inside = smooth(anatomy.programme(grid)), smooth(section.tissue.margin(grid)) > 0
    table = np.array(_LOOKS, np.float32).T
    eosin, cover, coarse, fibre, turn, wave = (column[domain] for column in table)
    fine, large = speckle(0.03), speckle(0.05)
    nuclei = np.where(coarse > 0, large, fine) > ndtri(1 - cover * np.exp(0.8 * programme))
    y, x = np.indices((height, width), np.float32, sparse=True)
    along = (x * np.cos(turn) + y * np.sin(turn)) / np.float32(pitch_px) + 0.05 * large
    matter = eosin + fibre * np.sin(2 * np.pi * along / wave) + 0.03 * fine - 0.05 * programme
    density = np.stack([0.06 + 0.75 * nuclei, np.maximum(matter, 0.05)], axis=-1)
    density *= inside[..., None]
    light = np.exp(-density @ section.patient.stains.astype(np.float32))
    return np.clip(245 * light + 3 * fine[..., None], 0, 255).astype(np.uint8)


def _genes() -> Genes:
    """Human genes, and made-up ones with ids that Ensembl does not give."""
    human = [pair.split(":") for pair in _HUMAN.split()]
    made_up = range(1, N_GENES - len(human) + 1)
    return Genes(
        symbols=np.array([s for s, _ in human] + [f"SIMG{i:04d}" for i in made_up]),
        ensembl=np.array([f"ENSG0000{i}" for _, i in human] + [f"ENSG009{i:08d}" for i in made_up]),
    )


def _field(wavelength: float, rng: np.random.Generator) -> Field:
    """Waves of about one length in pitches, in all directions."""
    angle = rng.uniform(0, 2 * np.pi, 12)
    number = 2 * np.pi / (wavelength * rng.uniform(0.7, 1.5, 12))
    waves = number[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return Field(waves, rng.uniform(0, 2 * np.pi, 12))


def _tissue(n_spots: int, rng: np.random.Generator) -> tuple[NDArray[np.int32], Tissue]:
    """A capture area, and tissue that holds exactly `n_spots` of its places."""
    n_cols = int(np.ceil(np.sqrt(n_spots / 0.75 * np.sqrt(3) / 2)))
    n_rows = int(np.ceil(n_cols * 2 / np.sqrt(3)))
    row, col = np.divmod(np.arange(n_rows * n_cols), n_cols)
    lattice = np.stack([row, 2 * col + row % 2], axis=1).astype(np.int32)
    xy = in_pitches(lattice)
    centre, half = xy.mean(axis=0), np.ptp(xy, axis=0) / 2
    at = centre + half * rng.uniform(-0.7, 0.7, (_HOLES, 2))
    radius = rng.uniform(0.05, 0.09, (_HOLES, 1)) * n_cols
    whole = Tissue(centre, half, _field(n_cols / 4, rng), np.hstack([at, radius]), 0.0)
    outside = np.sort(-whole.margin(xy))
    limit = float(outside[n_spots - 1 : n_spots + 1].mean())
    return lattice, replace(whole, limit=limit)


def _anatomy(xy: Floats, n_domains: int, rng: np.random.Generator) -> Anatomy:
    size = float(np.ptp(xy, axis=0).max())
    angle = rng.uniform(0, 2 * np.pi)
    kind: Literal["layers", "shells"] = "layers" if rng.random() < 0.5 else "shells"
    origin = xy.mean(axis=0) + (0 if kind == "layers" else 0.1 * size * rng.normal(0, 1, 2))
    anatomy = Anatomy(
        kind=kind,
        origin=origin,
        direction=np.array([np.cos(angle), np.sin(angle)]),
        size=size,
        warp=_field(size / 2, rng),
        edges=np.empty(0),
        activity=_field(size / 1.5, rng),
    )
    # Domains of unequal size, none of them small: edges at quantiles of the spots' depth.
    width = rng.dirichlet(np.full(n_domains, 8.0))
    return replace(anatomy, edges=np.quantile(anatomy.depth(xy), np.cumsum(width)[:-1]))


def _shares(depth: Floats, edges: Floats) -> Floats:
    """[N, C] part of each domain in a spot; spots at a border hold some of both sides."""
    above = 1 / (1 + np.exp(-(depth[:, None] - edges) / (_BORDER / 4)))
    ends = np.ones((len(depth), 1)), np.zeros((len(depth), 1))
    return -np.diff(np.hstack([ends[0], above, ends[1]]), axis=1)


def _library(xy: Floats, rng: np.random.Generator) -> Floats:
    """[N] expected molecules; partly a matter of where the spot lies, some are empty."""
    place = _field(float(np.ptp(xy, axis=0).max()) / 2, rng).at(xy)
    level = ndtr(0.6 * place + 0.8 * rng.normal(0, 1, len(xy)))
    low, high = np.log(LIBRARY)
    library = np.exp(low + (high - low) * level)
    return np.asarray(np.where(rng.random(len(xy)) < EMPTY_SHARE, 0, library))


def _counts(log_mean: Floats, library: Floats, rng: np.random.Generator) -> sparse.csr_array:
    """NB(mean = library x share of the gene, variance = mean + mean^2 / dispersion)."""
    share = np.exp(log_mean)
    mean = library[:, None] * share / share.sum(axis=1, keepdims=True)
    rate = rng.gamma(_INVERSE_DISPERSION, 1 / _INVERSE_DISPERSION, mean.shape)
    return sparse.csr_array(rng.poisson(mean * rate).astype(np.int32))


def _enlarged(values: Floats, step: int) -> NDArray[np.float32]:
    """Bilinear, `values[i, j]` at pixel (i step, j step)."""
    from scipy.ndimage import zoom

    shape = [(side - 1) * step + 1 for side in values.shape]
    factors = [new / old for new, old in zip(shape, values.shape, strict=True)]
    return np.asarray(zoom(values.astype(np.float32), factors, order=1))
