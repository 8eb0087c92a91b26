"""Where a run comes from: software, slides, split, encoders and their licences.

No times and no paths of the machine: the same run writes the same file.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from st_align import __version__
from st_align.config import Config, to_dict
from st_align.encoders.base import FrozenEntry, registered

if TYPE_CHECKING:
    from st_align.encoders.base import FrozenEncoder

NOT_STATED = "not stated"
_NON_COMMERCIAL = re.compile(r"\bNC\b|non-?commercial|research only", re.IGNORECASE)
_LIBRARIES = ("numpy", "scipy", "torch", "torchvision", "timm", "lightning-fabric", "safetensors")


def json_hash(value: Any) -> str:
    """12 hex digits of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def software() -> dict[str, str]:
    """Versions of this package, Python and the libraries that decide the numbers."""
    versions = {"st-align": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def config_hash(config: Config) -> str:
    """12 hex digits of the settings; where weights lie on this machine does not count."""
    values = to_dict(config)
    del values["encoders"]
    return json_hash(values)


def frozen_facts(encoder: FrozenEncoder) -> dict[str, Any]:
    """What is to be known of a frozen encoder by whoever uses what it gave: name, fingerprint,
    source and licence of its weights.
    """
    entry = registered().get(encoder.name)
    facts = {"name": encoder.name, "fingerprint": encoder.fingerprint}
    if not isinstance(entry, FrozenEntry):
        return facts
    info = entry.info
    return {**facts, "source": info.source, "licence": info.licence, "gated": info.gated}


def licences(facts: Mapping[str, Any], slide: str | None = None) -> dict[str, Any]:
    """The licences behind all that a run writes, from its provenance.

    `weights`: encoder -> licence; `data`: licence -> number of training slides, those of the run
    it started from too; `slide`: the licence of the slide a file is about, where it is about one;
    `non_commercial`: what of it forbids commercial use.
    """
    weights: dict[str, str] = {}
    slides: dict[str, str] = {}
    source: Mapping[str, Any] | None = facts
    while source:
        encoders = source.get("encoders", {}).values()
        weights |= {e["name"]: e.get("licence", NOT_STATED) for e in encoders}
        slides |= {s["id"]: s.get("licence") or NOT_STATED for s in source.get("slides", [])}
        source = source.get("init")
    record: dict[str, Any] = {"weights": weights, "data": dict(Counter(sorted(slides.values())))}
    if slide is not None:
        record["slide"] = slide or NOT_STATED
    named = {**weights, **{text: text for text in (*slides.values(), record.get("slide", ""))}}
    record["non_commercial"] = sorted(k for k, v in named.items() if _NON_COMMERCIAL.search(v))
    return record


def licence_words(record: Mapping[str, Any]) -> dict[str, str]:
    """What `licences` found, in words; files of earlier versions hold no record."""
    if not record:
        return {"licences": "not recorded: the file is of an earlier version"}
    weights = [f"{name}: {licence}" for name, licence in record["weights"].items()]
    data = [f"{licence} ({n} slide{'s'[: n > 1]})" for licence, n in record["data"].items()]
    barred = ", ".join(record["non_commercial"])
    words = {
        "weights licence": "; ".join(weights) or "no pretrained weights",
        "data licence": "; ".join(data) or NOT_STATED,
        "slide licence": record.get("slide", ""),
        "use": f"non-commercial only, by the terms of {barred}"
        if barred
        else "none of these licences says non-commercial",
    }
    return {name: text for name, text in words.items() if text}


def model_card(facts: Mapping[str, Any]) -> str:
    """Markdown for whoever gets the run: what it was trained on, and on which terms."""
    slides, held = facts.get("slides", []), facts.get("held_out", {}).get("slides", [])
    patients = {s.get("patient") for s in slides}
    terms = [f"- {name}: {text}" for name, text in licence_words(licences(facts)).items()]
    state = "finished" if facts.get("finished") else "not finished"
    n_spots = sum(s.get("n_spots", 0) for s in slides)
    lines = [
        "# A model of ST-Align",
        "",
        f"Training slides {len(slides):,}, patients {len(patients):,}, spots {n_spots:,}; "
        f"{facts.get('step', 0):,} of {facts.get('steps', 0):,} steps, {state}. "
        f"Held out: {', '.join(held) or 'nothing'}.",
        "",
        "## Terms",
        "",
        *terms,
        "",
        "Whoever passes the model on, or what it made, passes these terms on. They are those that "
        "the sources state; ST-Align's own code is BSD-3-Clause.",
        "",
        "Slides, settings and versions: `provenance.json`, `config.json`, or `st-align inspect`.",
        "",
    ]
    return "\n".join(lines)
