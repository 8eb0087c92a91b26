"""Figures of slides: domains, genes, embedding, niche, attention; and of training.

Every function takes one AnnData, a dict of them by slide, or a SpatialData, draws a panel for each
slide and returns the matplotlib Figure; `save` writes it to a file. Nothing is shown by itself: a
notebook shows the figure that a cell ends with.

Shape letters: N spots, T image tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from st_align import adapt, figures, keys, shown
from st_align.adapt import Where
from st_align.errors import ConfigError, SlideError, nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from st_align.io.objects import Part

__all__ = ["attention", "domains", "embedding", "genes", "niche", "training"]

_INCH = 4.2


def domains(
    data: Any,
    *,
    key: str = keys.DOMAIN,
    label_key: str | None = None,
    save: str | Path | None = None,
    **where: Unpack[Where],
) -> Figure:
    """Spots coloured by the column `key`, over all slides in the same colours.

    With `label_key` the labels stand beside it, and groups take the colours of the labels they
    overlap most. A column that is not there is a SlideError.
    """
    parts = adapt.parts_of(data, **where)
    groups = {name: _groups(parts, name) for name in (key, label_key) if name is not None}
    labels = None if label_key is None else _joined(groups[label_key])
    colours = {key: figures.matched_colors(_joined(groups[key]), labels)}
    if labels is not None and label_key is not None:
        colours[label_key] = figures.matched_colors(labels, None)
    figure, axes = _grid(len(parts), len(groups))
    for row, part in enumerate(parts):
        view = _view(part)
        for column, (name, of) in enumerate(groups.items()):
            shades = [colours[name].get(group, figures.GREY) for group in of[row]]
            _draw(axes[row, column], view, shades, f"{part.id}: {name}")
            if row == 0:
                _legend(axes[row, column], colours[name])
    return _saved(figure, save)


def genes(
    data: Any,
    names: str | Sequence[str],
    *,
    predicted: bool = False,
    save: str | Path | None = None,
    **where: Unpack[Where],
) -> Figure:
    """log1p counts per ten thousand of genes, a row a slide; `predicted` takes those that
    `tl.predict_genes` found. A gene that a slide does not have is a ConfigError.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    parts = adapt.parts_of(data, **where)
    figure, axes = _grid(len(parts), len(wanted))
    for row, part in enumerate(parts):
        view = _view(part)
        for column, name in enumerate(wanted):
            values = _expression(part, name, predicted)
            kind = "predicted" if predicted else "log1p CP10k"
            _values(figure, axes[row, column], view, values, f"{part.id}: {name}", kind)
    return _saved(figure, save)


def embedding(
    data: Any,
    *,
    color: str = keys.DOMAIN,
    use: str | None = None,
    save: str | Path | None = None,
    **where: Unpack[Where],
) -> Figure:
    """The first two axes of an embedding, all slides in one panel, coloured by an obs column.

    For UMAP: `sc.pp.neighbors(adata, use_rep="X_stalign")`, `sc.tl.umap(adata)`.
    """
    parts = adapt.parts_of(data, **where)
    name = keys.EMBEDDING if use is None else keys.embedding(use)
    for part in parts:
        if name not in part.table.obsm:
            raise SlideError(f"obsm[{name!r}] not found", fix="run sta.tl.embed first")
    points = np.concatenate([np.asarray(p.table.obsm[name])[p.rows, :2] for p in parts])
    groups = _joined(_groups(parts, color))
    colours = figures.matched_colors(groups, None)
    figure, axes = _grid(1, 1)
    shades = [colours.get(group, figures.GREY) for group in groups]
    axes[0, 0].scatter(*points.T, c=shades, s=6, linewidths=0)
    axes[0, 0].set(xlabel=f"{name} 1", ylabel=f"{name} 2", title=color)
    _legend(axes[0, 0], colours)
    return _saved(figure, save)


def niche(
    data: Any,
    *,
    spot: str | int = 0,
    key: str = keys.NICHE,
    save: str | Path | None = None,
    **where: Unpack[Where],
) -> Figure:
    """The niche of one spot (a name, or its row in the slide) over the slide; after `pp.niches`."""
    parts = adapt.parts_of(data, **where)
    name = keys.connectivities(key)
    figure, axes = _grid(1, len(parts))
    for column, part in enumerate(parts):
        if name not in part.table.obsp:
            raise SlideError(f"obsp[{name!r}] not found", fix="run sta.pp.niches first")
        row = _row(part, spot)
        members = np.isin(part.rows, part.table.obsp[name][[row]].indices)
        shades = np.where(members, "#0072B2", figures.GREY).astype(object)
        shades[part.rows == row] = "#D55E00"
        title = f"{part.id}: {part.table.obs_names[row]} and {int(members.sum())} neighbours"
        _draw(axes[0, column], _view(part), shades.tolist(), title)
    return _saved(figure, save)


def attention(
    data: Any,
    *,
    spots: int | Sequence[str] = 4,
    key: str = keys.ATTENTION,
    image: str | Path | None = None,
    save: str | Path | None = None,
    **where: Unpack[Where],
) -> Figure:
    """Where the genes of some spots look in their image: patches and the attention on their cells;
    after `tl.attention`. `spots` are names, or how many, spread over the slide.
    """
    from st_align.prepare import prepare_slide

    [part, *more] = adapt.parts_of(data, **where)
    if more:
        raise ConfigError("attention is shown of one slide", found=f"{1 + len(more)} slides")
    if key not in part.table.obsm:
        raise SlideError(f"obsm[{key!r}] not found", fix="run sta.tl.attention first")
    weights = np.asarray(part.table.obsm[key])
    side = round(float(np.sqrt(weights.shape[1])))
    if side * side != weights.shape[1]:
        raise SlideError("these tokens are no grid", found=f"{weights.shape[1]} of them")
    slide = part.slide(adapt.options(image=image))
    prepared = prepare_slide(slide, ())
    rows = part.rows_of(slide.barcodes)
    chosen = (
        prepared.spread(spots).tolist()
        if isinstance(spots, int)
        else [int(np.flatnonzero(rows == _row(part, spot))[0]) for spot in spots]
    )
    figure, axes = _grid(len(chosen), 2)
    for row, i in enumerate(chosen):
        patch = prepared.spot_patches
        if patch is not None:
            axes[row, 0].imshow(patch[i])
        axes[row, 0].set_title(str(slide.barcodes[i]), fontsize=9)
        drawn = axes[row, 1].imshow(weights[rows[i]].reshape(side, side), cmap=figures.SEQUENTIAL)
        figure.colorbar(drawn, ax=axes[row, 1], fraction=0.046, label="share of attention")
        for axis in axes[row]:
            axis.set_axis_off()
    return _saved(figure, save)


def training(run: str | Path, *, save: str | Path | None = None) -> Figure:
    """The loss terms of a run against the step, beside what guessing costs (ln B, dashed)."""
    from st_align import runlog
    from st_align.checkpoint import METRICS, resolve_model
    from st_align.errors import require_file

    log = runlog.read(require_file(resolve_model(run) / METRICS, "the log of the training"))
    figure, axes = _grid(1, 3, height=0.75)
    for axis, name in zip(axes[0], ("spot", "niche", "cross"), strict=True):
        steps = [line["step"] for line in log]
        axis.plot(steps, [line[name] for line in log], color="#0072B2", linewidth=1)
        axis.plot(steps, [line[f"ln_{name}"] for line in log], "--", color="#777777", linewidth=1)
        axis.set(title=name, xlabel="step", ylim=(0, None))
    return _saved(figure, save)


def _view(part: Part) -> figures.SlideView:
    """Coordinates, spot size and image of one slide."""
    table = part.table
    if keys.SPATIAL in table.obsm:
        library = shown.mapping(table.uns.get(keys.SPATIAL))
        kept = {part.id: library[part.id]} if part.id in library else library
        return shown.slide_view(_sub(part, table.obsm[keys.SPATIAL], kept))
    slide = part.slide(adapt.options(no_image=True))
    xy = np.zeros((table.n_obs, 2))
    xy[part.rows_of(slide.barcodes)] = slide.xy
    return shown.slide_view(_sub(part, xy, {}))


def _sub(part: Part, xy: NDArray[Any], spatial: Mapping[str, Any]) -> Any:
    import anndata

    return anndata.AnnData(
        obs=part.table.obs.iloc[part.rows][[]],
        obsm={keys.SPATIAL: np.asarray(xy)[part.rows]},
        uns={keys.SPATIAL: dict(spatial)},
    )


def _groups(parts: Sequence[Part], name: str) -> list[list[str]]:
    return [shown.groups(part.table.obs.iloc[part.rows], name) for part in parts]


def _joined(groups: Sequence[Sequence[str]]) -> list[str]:
    return [name for of in groups for name in of]


def _row(part: Part, spot: str | int) -> int:
    """Row of the table of a spot of the slide."""
    if isinstance(spot, int) and 0 <= spot < len(part.rows):
        return int(part.rows[spot])
    found = part.rows[part.table.obs_names[part.rows] == spot]
    if len(found) != 1:
        raise ConfigError(f"slide {part.id!r} has no spot {spot!r}", fix="give one of obs_names")
    return int(found[0])


def _expression(part: Part, name: str, predicted: bool) -> NDArray[np.float64]:
    from st_align.expression import log_normalise

    if predicted:
        found = shown.predicted(part.table)
        if name not in found:
            raise ConfigError(f"{name!r} was not predicted", fix=nearest(name, map(str, found)))
        return np.asarray(found[name], np.float64)[part.rows]
    slide = part.slide(adapt.options(no_image=True))
    known = [] if slide.genes is None else slide.genes.symbols.tolist()
    if name not in known or slide.counts is None or slide.total_umi is None:
        raise ConfigError(f"slide {part.id!r} has no gene {name!r}", fix=nearest(name, known))
    column, valid = log_normalise(slide.counts[:, [known.index(name)]], slide.total_umi)
    values = np.full(part.table.n_obs, np.nan)
    values[part.rows_of(slide.barcodes)] = np.where(valid, column.toarray()[:, 0], np.nan)
    return np.asarray(values[part.rows])


def _grid(rows: int, columns: int, height: float = 1.0) -> tuple[Figure, NDArray[Any]]:
    from matplotlib.figure import Figure

    size = (_INCH * columns + 0.8, _INCH * height * rows)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    return figure, np.atleast_2d(figure.subplots(rows, columns, squeeze=False))


def _draw(axes: Any, view: figures.SlideView, colours: Any, title: str) -> Any:
    """Spots of their physical size over the histology."""
    if view.image is not None:
        height, width = (side / view.scale for side in view.image.shape[:2])
        axes.imshow(view.image, extent=(0, width, height, 0), alpha=0.6)
    options = {"facecolors": colours} if isinstance(colours, list) else {"array": colours}
    spots = figures.draw_spots(axes, view, **options)
    x0, x1, y0, y1 = view.extent
    axes.set(xlim=(x0, x1), ylim=(y1, y0), aspect="equal")
    axes.set_axis_off()
    axes.set_title(title, fontsize=9)
    return spots


def _values(
    figure: Any, axes: Any, view: figures.SlideView, values: NDArray[Any], title: str, kind: str
) -> None:
    spots = _draw(axes, view, np.ma.masked_invalid(values), title)
    spots.set_cmap(figures.SEQUENTIAL)
    figure.colorbar(spots, ax=axes, fraction=0.046, label=kind)


def _legend(axes: Any, colours: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=name)
        for name, colour in colours.items()
    ]
    axes.legend(
        handles=marks, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8
    )


def _saved(figure: Figure, save: str | Path | None) -> Figure:
    if save is not None:
        figure.savefig(Path(save))
    return figure
