"""`st-align domains --joint`: one set of domains over the slides of a cohort."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from st_align import adapt, keys, store
from st_align.commands.domains import (
    DomainRequest,
    embedding_of,
    labels_of,
    number_of,
    targets_of,
    views_of,
)
from st_align.commands.output import print_warnings
from st_align.errors import ConfigError, OutputError, SlideError
from st_align.files import replace_file
from st_align.io.objects import Part, parts_of
from st_align.joint import Seen, counts_views, joint_domains
from st_align.metrics import ari, labelled, nmi
from st_align.prepare import prepare_slide
from st_align.slide import LATTICE, Slide

SHARES = "domain_shares.csv"
_EXPRESSION = "expression"
"""What is clustered where there are no embeddings."""


def find_joint_domains(
    files: Sequence[Path], request: DomainRequest, *, out: Path | None = None
) -> dict[str, Any]:
    """`st-align domains --joint`: files of `st-align embed`, or any with counts and coordinates.

    Domains and their probabilities go into the files, or into copies in the folder `out` with the
    table `domain_shares.csv`; files that are not ours are never changed. A slide that cannot be
    read or written leaves all files as they were.
    """
    targets = targets_of(files, out)
    tables = {_name(path, files): store.read_h5ad(path) for path in files}
    foreign = [name for name, adata in tables.items() if keys.EMBEDDING not in adata.obsm]
    if foreign and out is None:
        raise OutputError(
            "domains are not written into files that st-align embed did not write",
            expected="a folder for their copies: --out FOLDER",
            found=", ".join(foreign),
        )
    parts = parts_of(tables)
    result, shares = cohort_domains(parts, request)
    with ExitStack() as written:
        for adata, target in zip(tables.values(), targets, strict=True):
            written.enter_context(store.writing(adata, target))
    if out is not None and out.is_dir():
        replace_file(out / SHARES, shares.to_csv(index=False).encode())
    wide = shares.pivot_table(index=["patient", "slide"], columns="domain", values="share")
    print(f"{result['n_domains']} domains over {len(parts)} slides ({result['use']})")
    print(wide.map("{:.0%}".format).to_string())
    if "mean_ari" in result:
        print(f"mean ARI {result['mean_ari']:.3f}")
    print_warnings(result["warnings"])
    print(f"written: {out or ', '.join(map(str, files))}")
    return result


def cohort_domains(
    parts: Sequence[Part], request: DomainRequest, *, key_added: str = keys.DOMAIN
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Domains of all `parts` into their tables; what was found, and the shares of the domains by
    slide (`JointDomains.shares`).
    """
    method = request.method or "consensus"
    if method not in ("consensus", "gmm") or request.refine:
        raise ConfigError(
            "joint domains are a consensus of Gaussian mixtures, or one",
            expected="--method consensus or gmm, without --refine",
            found=method + ", refined" * request.refine,
        )
    # By name, or what is drawn by chance would depend on the order of the files.
    parts = sorted(parts, key=lambda part: part.id)
    seen, rows, use, patients, warnings = _embeddings(parts, request.use, method)
    found = joint_domains(
        seen, number_of(request.n_domains), method=method, runs=request.runs, seed=request.seed
    )
    names = [str(k) for k in range(found.n_domains)]
    slides: dict[str, Any] = {}
    for part, at, labels in zip(parts, rows, found.labels, strict=True):
        entry = _entry(part, at, labels, request.label_key)
        slides[part.id] = {
            **entry,
            "method": f"joint {method}",
            "use": use,
            "n_domains": found.n_domains,
        }
    # Scores come first: one that fails leaves the tables as they were.
    over = [part.id for part in parts]
    for i, part in enumerate(parts):
        named = [names[k] for k in found.labels[i]]
        adapt.set_column(part, parts, key_added, rows[i], named)
        frame = pd.DataFrame(found.probabilities[i], columns=names)
        adapt.scatter(part, keys.probability(key_added), rows[i], frame)
        adapt.note(part, parts, domains={**slides[part.id], "over": over})
    result = {"slides": slides, "n_domains": found.n_domains, "use": use, "warnings": warnings}
    scored = [entry["ari"]["mean"] for entry in slides.values() if "ari" in entry]
    if scored:
        result["mean_ari"] = float(np.mean(scored))
    shares = found.shares([part.id for part in parts], patients)
    result["shares"] = shares.to_dict("records")
    return result, shares


def _embeddings(
    parts: Sequence[Part], use: str | None, method: str
) -> tuple[list[Seen], list[NDArray[np.intp]], str, list[str], list[str]]:
    """Every slide on common axes, its rows, what is seen, patients, warnings."""
    if all(keys.EMBEDDING in part.table.obsm for part in parts):
        return _of_model(parts, use, method)
    if use is not None:
        raise SlideError(
            f"not all slides have a {use} embedding",
            found=", ".join(p.id for p in parts if keys.EMBEDDING not in p.table.obsm),
            fix="run st-align embed on them, or leave out --use to read the counts",
        )
    slides = [part.slide(adapt.options(no_image=True)) for part in parts]
    rows = [part.rows_of(slide.barcodes) for part, slide in zip(parts, slides, strict=True)]
    prepared = [prepare_slide(slide, (_niche(slide),)) for slide in slides]
    warnings = [f"{slide.id}: {text}" for slide in prepared for text in slide.warnings]
    patients = [slide.patient for slide in prepared]
    return counts_views(prepared), rows, _EXPRESSION, patients, warnings


def _niche(slide: Slide) -> str:
    """The ring around a spot; the four nearest spots are that of a square lattice whose rows and
    columns are not known.
    """
    unknown = slide.places is None and LATTICE[slide.technology] == "square"
    return "k4" if unknown else "lattice"


def _of_model(
    parts: Sequence[Part], use: str | None, method: str
) -> tuple[list[Seen], list[NDArray[np.intp]], str, list[str], list[str]]:
    found = [adapt.embedded(part) for part in parts]
    models: dict[str, str] = {}
    for part, (adata, _) in zip(parts, found, strict=True):
        models.setdefault(str(store.notes(adata).get("model_hash")), part.id)
    if len(models) > 1:
        raise SlideError(
            "the slides were embedded with different models",
            expected="one model",
            found="; ".join(f"{id}: {hash}" for hash, id in models.items()),
            fix="embed all of them with one",
        )
    looked = [views_of(adata, use, method) for adata, _ in found]
    patients = [str(adapt.notes(part).get("patient", part.id)) for part in parts]
    # A slide without an image has no learned view: then none has.
    shared = [name for name in looked[0][1] if all(name in names for _, names, _ in looked)]
    if not shared:
        raise SlideError(
            "the slides are not embedded from the same modalities",
            expected="a view that all of them have",
            found="; ".join(
                f"{part.id}: {', '.join(names)}"
                for part, (_, names, _) in zip(parts, looked, strict=True)
            ),
            fix="name one by --use, or leave out those that lack an image or counts",
        )
    # Where a slide lacks counts, the number of domains is read off what it has.
    linear = any(name in keys.LINEAR_USES for name in shared)
    seen = [
        Seen(
            x if linear else embedding_of(adata, use)[0],
            [v.x for name, v in zip(names, views, strict=False) if name in shared],
        )
        for (x, names, views), (adata, _) in zip(looked, found, strict=True)
    ]
    return seen, [rows for _, rows in found], "+".join(shared), patients, []


def _entry(
    part: Part, rows: NDArray[np.intp], labels: NDArray[np.int64], label_key: str | None
) -> dict[str, Any]:
    """Scores of one slide where it has labels."""
    if label_key is None or label_key not in part.table.obs:
        return {}
    truth = labels_of(part.table, label_key)
    if truth is None or not labelled(truth[rows]).any():
        return {}
    score = ari(truth[rows], labels)
    return {
        "label_key": label_key,
        "ari": {"mean": score, "std": 0.0, "runs": [score]},
        "nmi": nmi(truth[rows], labels),
    }


def _name(path: Path, files: Sequence[Path]) -> str:
    """The file's name without its ending; its path where two have the same."""
    alone = sum(other.stem == path.stem for other in files) == 1
    return path.stem if alone else str(path.resolve()).strip("/").replace("/", "_")
