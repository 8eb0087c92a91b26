"""JSON schemas of what `--json` writes, one a verb: keys that they name stay, new ones may come."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from st_align.errors import ConfigError, nearest


def schema(verb: str) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a verb's result, for instance of `genes predict`.

    Raises:
        ConfigError: no such verb.

    """
    name = verb.replace(" ", "-")
    if name not in names():
        raise ConfigError(f"no schema for the verb {verb!r}", fix=nearest(name, names()))
    text = resources.files(__package__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def names() -> list[str]:
    """Verbs with a schema, sorted; a verb of two words is joined by a hyphen."""
    files = (file.name for file in resources.files(__package__).iterdir())
    return sorted(name.removesuffix(".json") for name in files if name.endswith(".json"))
