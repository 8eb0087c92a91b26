"""`STAlign.load(...)`: a trained model ready for slides."""

from __future__ import annotations

import functools
from pathlib import Path

from st_align.checkpoint import Preprocess, Run, load_run
from st_align.infer import Embedder, SlideEmbeddings, training_slides
from st_align.prepare import NICHE_PX, SPOT_PX, prepare_slide
from st_align.slide import PreparedSlide, Slide


def prepare_as(preprocess: Preprocess, slide: Slide) -> PreparedSlide:
    """A slide cut as `preprocess` says; as by default where a model reads patches of any size."""
    return prepare_slide(
        slide,
        (preprocess.niche,),
        spot_px=preprocess.spot_px or SPOT_PX,
        niche_px=preprocess.niche_px or NICHE_PX,
    )


class STAlign:
    """A trained model and its frozen encoders, which are loaded once, when first needed."""

    def __init__(self, run: Run, *, progress: bool = False) -> None:
        self.run, self.progress = run, progress

    @classmethod
    def load(cls, model: str | Path, *, progress: bool = False) -> STAlign:
        """The model of a run folder, or a shipped one of that name. Raises ModelError.

        `progress` shows a bar for each long step.
        """
        return cls(load_run(model), progress=progress)

    @functools.cached_property
    def reader(self) -> Embedder:
        """What embeds slides."""
        return Embedder(self.run, progress=self.progress)

    @property
    def genes(self) -> tuple[str, ...]:
        """The genes the model reads, in its order."""
        return self.run.panel.genes

    @property
    def patients(self) -> dict[str, str]:
        """Patient of every slide the model was trained on."""
        return training_slides(self.run)

    def prepare(self, slide: Slide) -> PreparedSlide:
        """A slide cut as the model reads it."""
        return prepare_as(self.run.preprocess, slide)

    def embed(self, slide: Slide) -> SlideEmbeddings:
        """Embeddings of all spots of a slide. Raises ModelError, SlideError."""
        return self.reader.embed(self.prepare(slide))

    def __repr__(self) -> str:
        trained = f"trained on {len(self.patients)} slides"
        return f"STAlign({self.run.path.name!r}, {len(self.genes):,} genes, {trained})"


def ready(model: STAlign | str | Path) -> STAlign:
    """A loaded model as it is, the path or name of one loaded."""
    return model if isinstance(model, STAlign) else STAlign.load(model)
