"""Tools for AnnData and SpatialData: embed, domains, predict_genes, annotate, retrieve, attention.

Every function takes one AnnData, a dict of them by slide, or a SpatialData; writes into it and
returns None, or returns a copy with `copy=True`. `Where` names the options that all of them take.
`model` is a run folder, the name of a shipped checkpoint, or `STAlign.load(...)`, which saves
loading it again.

Shape letters: N spots of the table, D axes, g genes.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pandas as pd

from st_align import adapt, keys, store
from st_align.adapt import Where, note, opened, scatter, set_column, tell
from st_align.errors import ConfigError, SlideError

if TYPE_CHECKING:
    from anndata import AnnData

    from st_align.annotate import Seen
    from st_align.attention import Scale
    from st_align.predict import Head
    from st_align.slide import PreparedSlide
    from st_align.trained import STAlign

__all__ = [
    "annotate",
    "attention",
    "domains",
    "embed",
    "joint_domains",
    "predict_genes",
    "retrieve",
]


def embed(
    data: Any,
    *,
    model: STAlign | str | Path,
    image: str | Path | None = None,
    no_image: bool = False,
    technology: str | None = None,
    key_added: str = keys.EMBEDDING,
    copy: bool = False,
    **where: Unpack[Where],
) -> Any:
    """Embed slides the model never saw: `obsm[key_added]` [N, D] and `obsm[f"{key_added}_{use}"]`
    for image, gene, spot, niche, spot_niche, linear, linear-scaled; where they come from in
    `uns["stalign"]`.

    Nothing is fitted on the slide but its mean. Spots off the tissue hold NaN.

    Args:
        data: with raw counts, an image, or both.
        model: see above.
        image: full-resolution image of the one slide given, instead of that in `uns["spatial"]`.
        no_image: embed counts alone.
        technology: `Visium` or `ST`, where barcodes and places do not tell.
        key_added: name of the default embedding and prefix of the others.
        copy: return a copy.
        where: see `adapt.Where`.

    Raises:
        SlideError: no coordinates, no image, counts that are not raw.
        ModelError: the model does not fit (no gene in common, another species).

    """
    from st_align.embedded import to_anndata
    from st_align.infer import without_image
    from st_align.trained import ready

    data, parts = opened(data, copy, where)
    trained = ready(model)
    for part in parts:
        slide = part.slide(adapt.options(image=image, no_image=no_image, technology=technology))
        prepared = trained.prepare(slide)
        found = trained.reader.embed(prepared)
        # The picture is there already: without it none is stitched anew.
        ours = to_anndata(trained.run, without_image(prepared), found)
        rows = part.rows_of(slide.barcodes)
        for name in ours.obsm:
            if name.startswith(keys.EMBEDDING):
                scatter(part, key_added + name.removeprefix(keys.EMBEDDING), rows, ours.obsm[name])
        if key_added == keys.EMBEDDING:  # what `domains` reads
            part.table.uns[keys.TRAINING] = dict(found.training)
        note(part, parts, **{**store.notes(ours), "um_per_px": prepared.um_per_px})
        tell(part, found.warnings)
    return data if copy else None


def domains(
    data: Any,
    *,
    n_domains: int | str = "auto",
    use: str | None = None,
    label_key: str | None = None,
    method: str | None = None,
    refine: bool = False,
    runs: int = 5,
    seed: int = 0,
    key_added: str = keys.DOMAIN,
    copy: bool = False,
    **where: Unpack[Where],
) -> Any:
    """Spatial domains of embedded slides, each slide by itself, in the categorical
    `obs[key_added]`; scores in `uns["stalign"]` where `label_key` is given.

    Where a table holds several slides the names are `SLIDE:0`, `SLIDE:1`, ..., because domains of
    two slides have nothing to do with each other: `joint_domains` finds one set for all.

    Args:
        data: after `embed`.
        n_domains: 2 or more, or `auto`.
        use: image, gene, spot, niche, spot+niche, linear or linear-scaled; by default the model's
            and both linear ones together.
        label_key: obs column to score against.
        method: consensus (the default), gmm or kmeans.
        refine: smooth over the lattice.
        runs: how often the clusterer is started anew; the best fit is kept.
        seed: of the starts.
        key_added: name of the obs column.
        copy: return a copy.
        where: see `adapt.Where`.

    Raises:
        SlideError: nothing is embedded. ConfigError: an option out of range.

    """
    from st_align.commands.domains import DomainRequest, slide_domains

    data, parts = opened(data, copy, where)
    request = DomainRequest(
        n_domains=str(n_domains), use=use, label_key=label_key, method=method, refine=refine,
        runs=runs, seed=seed,
    )  # fmt: skip
    found = []
    for part in parts:
        sub, rows = adapt.embedded(part)
        if refine and keys.SPATIAL not in sub.obsm:
            slide = part.slide(adapt.options(no_image=True))
            places = pd.DataFrame(slide.xy, slide.barcodes).reindex(sub.obs_names.astype(str))
            sub.obsm[keys.SPATIAL] = places.to_numpy()
        found.append((part, rows, sub, slide_domains(sub, request)))
    for part, rows, sub, entry in found:
        names = sub.obs[keys.DOMAIN].astype(str).to_numpy()
        if sum(p.table is part.table for p in parts) > 1:
            names = np.array([f"{part.id}:{name}" for name in names])
        set_column(part, parts, key_added, rows, names)
        note(part, parts, domains=entry)
    return data if copy else None


def predict_genes(
    data: Any,
    *,
    model: STAlign | str | Path,
    head: Head | str | Path,
    image: str | Path | None = None,
    technology: str | None = None,
    key_added: str = keys.PREDICTED,
    copy: bool = False,
    **where: Unpack[Where],
) -> Any:
    """Expression from the image alone, log1p CP10k, as a DataFrame [N, g] in `obsm[key_added]`.

    `head` was written by `st-align genes fit` for this model. Spots off the tissue hold NaN.

    Raises:
        SlideError: no image. ModelError: the head belongs to another model.

    """
    from st_align.predict import Head, predict
    from st_align.trained import ready

    data, parts = opened(data, copy, where)
    trained = ready(model)
    fitted = head if isinstance(head, Head) else Head.load(Path(head))
    for part in parts:
        slide = part.slide(adapt.options(image=image, technology=technology))
        prepared = trained.prepare(slide)
        values = predict(fitted, trained.reader, prepared)
        scatter(part, key_added, part.rows_of(slide.barcodes), values)
        tell(part, prepared.warnings)
    return data if copy else None


def joint_domains(
    data: Any,
    *,
    n_domains: int | str = "auto",
    use: str | None = None,
    label_key: str | None = None,
    method: str | None = None,
    runs: int = 5,
    seed: int = 0,
    key_added: str = keys.DOMAIN,
    **where: Unpack[Where],
) -> pd.DataFrame:
    """One set of domains over all slides of `data` in `obs[key_added]`, their probabilities in
    `obsm[f"{key_added}_probability"]`; returns the share of every domain by slide and patient.

    Slides are clustered by their embeddings where all have them, else by their counts alone;
    `method` is consensus (the default) or gmm. The order of the slides does not matter.

    Raises:
        SlideError: embeddings of different models, no counts. ConfigError: an option out of range.

    """
    from st_align.commands.domains import DomainRequest
    from st_align.commands.joint import cohort_domains

    _, parts = opened(data, False, where)
    request = DomainRequest(
        n_domains=str(n_domains), use=use, label_key=label_key, method=method, runs=runs, seed=seed
    )
    return cohort_domains(parts, request, key_added=key_added)[1]


def annotate(
    data: Any,
    *,
    reference: Any,
    label_key: str,
    model: STAlign | str | Path,
    no_image: bool = False,
    key_added: str = keys.LABEL,
    copy: bool = False,
    **where: Unpack[Where],
) -> Any:
    """Carry the labels `obs[label_key]` of `reference` (AnnData, dict or SpatialData) over to the
    slides of `data`: categorical `obs[key_added]` (`unknown` where a spot is unlike all of them)
    and calibrated `obsm[f"{key_added}_probability"]`.

    Raises:
        SlideError: too few labels, or nothing in common. ConfigError: no such column.

    """
    from st_align.annotate import Labelled, reads_embeddings
    from st_align.annotate import annotate as carry_over
    from st_align.commands.annotate import labels_of, probabilities, seen, summary
    from st_align.trained import ready

    data, parts = opened(data, copy, where)
    trained, read = ready(model), adapt.options(no_image=no_image)
    references = [trained.prepare(part.slide(read)) for part in adapt.parts_of(reference)]

    def look(slide: PreparedSlide, embedded: bool) -> Seen:
        return seen(trained.run, slide, trained.reader.embed(slide) if embedded else None)

    @functools.cache
    def known(embedded: bool) -> list[Labelled]:
        return [
            Labelled(**vars(look(one, embedded)), labels=labels_of(one.spots, label_key))
            for one in references
        ]

    for part in parts:
        slide = part.slide(read)
        prepared = trained.prepare(slide)
        embedded = reads_embeddings(references, prepared)
        answer = carry_over(known(embedded), look(prepared, embedded))
        rows = part.rows_of(slide.barcodes)
        set_column(part, parts, key_added, rows, answer.labels.tolist())
        frame = probabilities(answer, pd.Index(slide.barcodes))
        scatter(part, keys.probability(key_added), rows, frame)
        note(part, parts, annotation={"label_key": label_key, **summary(answer)})
    return data if copy else None


def retrieve(
    query: AnnData,
    *,
    spot: str,
    within: Any,
    by: str = "image",
    n: int = 10,
    **where: Unpack[Where],
) -> pd.DataFrame:
    """The `n` spots of `within` (AnnData, dict or SpatialData, embedded) most like `spot`, a name
    in `query.obs_names`: columns slide, barcode, row, similarity (cosine).

    `by` is image or gene: the embedding that is compared. The spot itself is left out where
    `within` holds its slide. Raises SlideError and ConfigError.
    """
    from st_align.retrieve import Shelf, nearest

    name = keys.embedding(by)
    [asked] = adapt.parts_of(query)
    for table in (query, *(part.table for part in adapt.parts_of(within, **where))):
        if name not in table.obsm:
            raise SlideError(
                f"obsm[{name!r}] not found", fix="run sta.tl.embed(adata, model=RUN) first"
            )
    if spot not in query.obs_names:
        raise ConfigError(f"{spot!r} is no spot of the query", fix="give a name in obs_names")
    shelves = [
        Shelf(
            slide=part.id,
            barcodes=part.table.obs_names[part.rows].to_numpy().astype(str),
            vectors=np.asarray(part.table.obsm[name])[part.rows],
        )
        for part in adapt.parts_of(within, **where)
    ]
    vector = np.asarray(query.obsm[name])[query.obs_names.get_loc(spot)]
    return nearest(vector, shelves, n=n, leave_out=(asked.id, spot))


def attention(
    data: Any,
    *,
    model: STAlign | str | Path,
    scale: Scale = "spot",
    image: str | Path | None = None,
    key_added: str = keys.ATTENTION,
    copy: bool = False,
    **where: Unpack[Where],
) -> Any:
    """The share of a spot's attention that each image token gets from its genes, in
    `obsm[key_added]` [N, T]; see `attention.image_attention`. `pl.attention` shows it.
    """
    from st_align.attention import image_attention
    from st_align.trained import ready

    data, parts = opened(data, copy, where)
    trained = ready(model)
    for part in parts:
        slide = part.slide(adapt.options(image=image))
        weights = image_attention(trained.reader, trained.prepare(slide), scale=scale)
        scatter(part, key_added, part.rows_of(slide.barcodes), weights)
    return data if copy else None
