"""ST-Align: spot-niche pretraining of image and genes for spatial transcriptomics."""

__version__ = "0.1.0"
