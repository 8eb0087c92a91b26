"""What a corpus is, in numbers; and what any overview says, in words.

Apart from `overview`, which needs PyTorch to look at runs: `prepare` starts without it.
"""

from __future__ import annotations

from typing import Any

from st_align.corpus import Corpus

_SHOWN = 20
"""Slides left out that are listed: an index names a thousand where a folder holds ten."""


def corpus_overview(corpus: Corpus, *, verify: bool = False) -> dict[str, Any]:
    """`inspect --json` of a corpus; with `verify`, `damaged` names bad files by slide."""
    slides = {
        id: {
            "n_spots": entry["n_spots"],
            "patient": entry["patient"],
            "patient_origin": entry["patient_origin"],
            "um_per_px": entry["um_per_px"],
            "technology": entry["technology"],
            "warnings": list(entry["warnings"]),
        }
        for id, entry in corpus.manifest["slides"].items()
    }
    result: dict[str, Any] = {
        "kind": "corpus",
        "n_slides": len(slides),
        "n_spots": sum(s["n_spots"] for s in slides.values()),
        "n_patients": len({s["patient"] for s in slides.values()}),
        "slides": slides,
        "quarantined": dict(corpus.quarantined),
    }
    if verify:
        result["damaged"] = {id: found for id, found in corpus.verify().items() if found}
    return result


def describe(result: dict[str, Any]) -> str:
    """The result of `overview` as lines for a terminal."""
    if result["kind"] != "corpus":
        apart = ("diagnosis", "warnings")
        facts = {k: v for k, v in result.items() if k not in apart} | result.get("diagnosis", {})
        lines = [f"{name:<18} {_words(value)}" for name, value in facts.items()]
        return "\n".join([*lines, *(f"warning: {text}" for text in result.get("warnings", ()))])
    lines = [
        f"corpus: {_count(result['n_slides'], 'slide')} of "
        f"{_count(result['n_patients'], 'patient')}, "
        f"{result['n_spots']:,} spots",
        f"  {'slide':<40} {'patient':<16} {'spots':>6}  um/px",
    ]
    for id, slide in result["slides"].items():
        scale = "-" if slide["um_per_px"] is None else f"{slide['um_per_px']:.3g}"
        lines.append(f"  {id:<40} {slide['patient']:<16} {slide['n_spots']:>6}  {scale}")
        lines += [f"    warning: {text}" for text in slide["warnings"]]
    left_out = list(result["quarantined"].items())
    lines += [f"  left out: {id}: {why}" for id, why in left_out[:_SHOWN]]
    if len(left_out) > _SHOWN:
        lines.append(f"  left out: {len(left_out) - _SHOWN:,} more, see quarantine.json")
    if "damaged" in result:
        lines += [f"  DAMAGED {id}: {'; '.join(bad)}" for id, bad in result["damaged"].items()]
        if not result["damaged"]:
            lines.append("  every column agrees with its hash")
    return "\n".join(lines)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_words(v)}" for k, v in value.items()) or "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
