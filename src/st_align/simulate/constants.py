"""What is fixed about a simulated cohort."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Set once, before any learned model saw a simulated slide, and not touched since.

    They were chosen on seeds 0 to 2 (8 slides of 400 spots each) so that two yardsticks that learn
    nothing land in the bands `PCA_KMEANS_ARI` and `LINEAR_NICHE_ARI`: hard, with room above. To
    tune them to what a model scores would make the demo worthless.
    """

    # Section
    domains: tuple[int, int] = (5, 7)
    """Fewest and most domains of a cohort; all of its slides have the same."""
    places_per_spot: float = 1.5
    """Lattice places for each spot in tissue."""
    nested_share: float = 0.5
    """Chance that domains are nested; they are layers otherwise."""
    border_curvature: float = 0.32
    border_roughness: float = 0.16
    rough_pitches: float = 1.4
    """sd of the two fields that displace the borders, in half-widths of the section: one as wide as
    a third of the section bends them, one of so many pitches of the lattice frays them."""
    holes: tuple[int, int] = (2, 4)
    coarse_pitches: float = 2.2
    fine_pitches: float = 0.8
    """Length of the coarse and the fine part of the programme, in pitches of the lattice."""

    # Image
    px_per_spot: float = 34.0
    max_side_px: int = 2000
    hires_scale: float = 0.25
    """Pixels of the hires image per pixel of the imagined full-resolution one."""
    stain_shift: float = 0.08
    """sd of the log of a patient's stain colours and strengths."""

    # Counts
    markers_per_domain: int = 24
    marker_log_fold: float = 1.2
    """Mean log fold change of a marker in its domain."""
    marker_spill: float = 0.4
    """Share of it in the domains next to it."""
    domain_log_sd: float = 0.10
    """sd of the log effect of a domain on any gene."""
    programme_genes: int = 80
    programme_log_slope: float = 0.5
    """Mean size of the log change of a programme gene per sd of the programme."""
    patient_log_sd: float = 0.30
    slide_log_sd: float = 0.12
    """sd of the log batch effect per gene."""
    base_log_sd: float = 1.0
    smallest_library: float = 800.0
    library_fold: float = 10.0
    """Molecules of the smallest library of a slide; the largest has so many times more."""
    dispersion: float = 0.35
    """Variance of a count: mean + dispersion x mean^2."""
    empty_share: float = 0.01
    """Spots without any molecule."""


PCA_KMEANS_ARI = (0.20, 0.35)
LINEAR_NICHE_ARI = (0.45, 0.65)
"""Mean ARI over the slides, at the true number of domains and without smoothing."""
