"""From what a person types to a slide ready for a model: a path, `PATH::ID`, or `CORPUS::ID`."""

from __future__ import annotations

import dataclasses

from st_align.checkpoint import Preprocess
from st_align.corpus import Corpus, is_corpus
from st_align.errors import ConfigError
from st_align.infer import without_image
from st_align.io import ReadOptions
from st_align.io.detect import only_id, read_one, split_spec
from st_align.slide import PreparedSlide
from st_align.trained import prepare_as


def open_slide(
    spec: str, preprocess: Preprocess, options: ReadOptions
) -> tuple[PreparedSlide, Corpus | None]:
    """The one slide that `spec` names, cut as `preprocess` says; with the corpus it comes from,
    whose caches can be used.

    A corpus slide stays memory-mapped and is never cut again: of the options it can only be
    taken without its image, any other is a ConfigError. A path that holds several slides is an
    error that lists their ids.
    """
    path, id = split_spec(spec)
    if is_corpus(path):
        corpus = Corpus.open(path)
        return corpus_slide(corpus, id or only_id(spec, corpus.ids), options), corpus
    return prepare_as(preprocess, read_one(spec, options)), None


def corpus_slide(corpus: Corpus, id: str, options: ReadOptions) -> PreparedSlide:
    """A slide of a corpus, without its image where the options say so."""
    usable = ReadOptions(no_image=options.no_image)
    given = [
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != getattr(usable, field.name)
    ]
    if given:
        raise ConfigError(
            f"{' and '.join(given)} cannot be used with a slide of a corpus",
            found=f"{id} of {corpus.path}, whose files were read when it was prepared",
            fix="leave it out, or give the slide's own files instead of the corpus",
        )
    slide = corpus.slide(id)
    return without_image(slide) if options.no_image else slide
