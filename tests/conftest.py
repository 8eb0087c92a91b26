"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(os.environ.get("ST_ALIGN_SHARED", Path(__file__).parents[2] / "shared"))


def _folder(name: str) -> Path:
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"{path} is not here: real slides and parity fixtures lie beside the project")
    return path


@pytest.fixture(scope="session")
def data() -> Path:
    """The real slides."""
    return _folder("data")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The parity fixtures."""
    return _folder("golden")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
