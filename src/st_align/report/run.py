"""The report's section on a training run: what was run, on what, and how the losses went."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from st_align import figures, runlog
from st_align.checkpoint import CONFIG, METRICS, PROVENANCE, SPLITS
from st_align.errors import ModelError
from st_align.files import read_json
from st_align.provenance import licence_words, licences
from st_align.report import tables

_TERMS = {
    "spot": "Spot: image and genes",
    "niche": "Niche: image and genes",
    "cross": "Spot and niche",
}


def run_section(folder: Path) -> dict[str, Any]:
    """Everything the page shows of a run folder; a missing or damaged file is a ModelError."""
    if not folder.is_dir():
        raise ModelError(f"there is no run folder {folder}", expected="what st-align train wrote")
    config, facts, splits = (read_json(folder / name) for name in (CONFIG, PROVENANCE, SPLITS))
    log = _log(folder / METRICS)
    warnings = [] if facts.get("finished") else ["The training has not ended."]
    if facts.get("same_patient"):
        names = ", ".join(facts["same_patient"])
        warnings.append(f"Held out, but other slides of the same patient were trained on: {names}.")
    return {
        "facts": _facts(folder, config, facts, log),
        "warnings": warnings,
        "curves": None if log.empty else _curves(log),
        "slides": tables.plain_table(_slides(facts)),
        "held_out": _held_out(splits),
        "settings": tables.flat(config),
        "provenance": tables.flat(_provenance(facts)),
    }


def _log(path: Path) -> pd.DataFrame:
    """The lines of `metrics.jsonl`; a run that was stopped before its first has none."""
    if not path.is_file():
        return pd.DataFrame()
    try:
        return pd.DataFrame(runlog.read(path))
    except ValueError as error:
        raise ModelError(
            f"{path} is damaged", expected="lines of JSON", found=str(error)
        ) from error


def _facts(
    folder: Path, config: Mapping[str, Any], facts: Mapping[str, Any], log: pd.DataFrame
) -> dict[str, str]:
    slides, machine = facts["slides"], facts["machine"]
    terms = {k.capitalize(): text for k, text in licence_words(licences(facts)).items()}
    return tables.facts(
        [
            ("Run", folder.resolve().name),
            ("Preset", config.get("preset")),
            ("Training slides", len(slides)),
            ("Training patients", len({slide["patient"] for slide in slides})),
            ("Training spots", sum(slide["n_spots"] for slide in slides)),
            ("Panel", f"{facts['panel']['n_genes']:,} genes"),
            ("Steps", f"{facts.get('step', 0):,} of {facts.get('steps', 0):,}"),
            ("Epochs", facts.get("epochs")),
            ("Batch", f"{facts.get('batch')} spots"),
            ("Speed", f"{log['spots_per_s'].median():,.0f} spots/s" if len(log) else None),
            (
                "Ran on",
                f"{machine['device']}, ranks {machine['ranks']}, threads {machine['threads']}",
            ),
            ("Seed", facts.get("seed")),
            *terms.items(),
        ]
    )


def _curves(log: pd.DataFrame) -> dict[str, str]:
    steps = log["step"].to_numpy(np.float64)
    terms = {title: log[name].to_numpy(np.float64) for name, title in _TERMS.items()}
    chance = {title: log[f"ln_{name}"].to_numpy(np.float64) for name, title in _TERMS.items()}
    return {theme: figures.loss_curves(steps, terms, chance, theme) for theme in ("light", "dark")}


def _slides(facts: Mapping[str, Any]) -> pd.DataFrame:
    rows = [
        {"slide": s["id"], "patient": s["patient"], "spots": s["n_spots"]} for s in facts["slides"]
    ]
    return pd.DataFrame(rows, columns=["slide", "patient", "spots"])


def _held_out(splits: Mapping[str, Any]) -> str:
    held = splits["held_out"]
    if not held["slides"]:
        return "No slide was held out."
    patients = tables.text(held["patients"])
    return f"Held out: {tables.text(held['slides'])} (patients: {patients})."


def _provenance(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the page shows elsewhere, and without a hash for every file of a corpus."""
    shown = {k: v for k, v in facts.items() if k not in ("slides", "held_out", "same_patient")}
    if isinstance(shown.get("init"), Mapping):
        shown["init"] = {k: v for k, v in shown["init"].items() if k != "slides"}
    return shown
