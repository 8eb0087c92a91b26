"""Where a run comes from: software, slides, split, encoders and their licences.

No times and no paths of the machine: the same run writes the same file.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from st_align import __version__
from st_align.config import Config, to_dict

if TYPE_CHECKING:
    from st_align.batch import Role
    from st_align.encoders.base import FrozenEncoder, FrozenEntry

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


def encoder_facts(
    entries: Mapping[Role, FrozenEntry], encoders: Mapping[Role, FrozenEncoder]
) -> dict[str, dict[str, Any]]:
    """By role, the frozen encoder used: name, fingerprint, source and licence of its weights."""
    return {
        role: {
            "name": entry.name,
            "fingerprint": encoders[role].fingerprint,
            "source": entry.info.source,
            "licence": entry.info.licence,
            "gated": entry.info.gated,
        }
        for role, entry in entries.items()
    }
