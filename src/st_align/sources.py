"""From what a person types to a slide ready for a model: a path, `PATH::ID`, or `CORPUS::ID`."""

from __future__ import annotations

from pathlib import Path

from st_align.checkpoint import Preprocess
from st_align.corpus import Corpus, is_corpus
from st_align.errors import CorpusError, nearest
from st_align.io import ReadOptions
from st_align.io.detect import read_one
from st_align.prepare import prepare_slide
from st_align.slide import PreparedSlide

SEPARATOR = "::"
_LOOSE_PX = {"spot_px": 56, "niche_px": 112}


def open_slide(
    spec: str, preprocess: Preprocess, options: ReadOptions
) -> tuple[PreparedSlide, Corpus | None]:
    """The one slide that `spec` names, cut as `preprocess` says; with the corpus it comes from,
    whose caches can be used.

    A corpus slide stays memory-mapped and is never cut again. A path that holds several slides
    is an error that lists their ids.
    """
    path, _, id = spec.partition(SEPARATOR)
    if is_corpus(Path(path)):
        corpus = Corpus.open(Path(path))
        return corpus.slide(_one_id(corpus, id, path)), corpus
    sides = {
        "spot_px": preprocess.spot_px or _LOOSE_PX["spot_px"],
        "niche_px": preprocess.niche_px or _LOOSE_PX["niche_px"],
    }
    return prepare_slide(read_one(spec, options), (preprocess.niche,), **sides), None


def _one_id(corpus: Corpus, id: str, path: str) -> str:
    ids = list(corpus.ids)
    if not id and len(ids) == 1:
        return ids[0]
    if not id:
        shown = ", ".join(ids[:20]) + (", ..." if len(ids) > 20 else "")
        raise CorpusError(
            f"{path} holds {len(ids)} slides",
            expected="one slide",
            found=shown,
            fix=f"name it: {path}{SEPARATOR}{ids[0]}",
        )
    if id not in ids:
        raise CorpusError(f"{path} has no slide {id!r}", fix=nearest(id, ids))
    return id
