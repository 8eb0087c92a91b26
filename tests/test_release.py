"""What is released: the sdist and the wheel hold what they should, and the wheel works alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def run(*words: str | Path, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ST_ALIGN"))}
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    pytest.importorskip("build", reason="build is not installed: pip install build")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


def test_the_sdist_holds_what_tests_and_docs_need(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"constraints.txt", "Makefile", "CITATION.cff", "docs/conf.py", "tests/conftest.py"}
    assert wanted <= names
    assert not [n for n in names if n.startswith((".venv", "demo-out")) or n.endswith(".pyc")]


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    files = (ROOT / "src").rglob("*")
    package = {
        f.relative_to(ROOT / "src").as_posix()
        for f in files
        if f.is_file() and "__pycache__" not in f.parts
    }
    assert names == package


def test_the_metadata_passes_what_an_index_checks(dist: Path) -> None:
    pytest.importorskip("twine", reason="twine is not installed: pip install twine")
    said = run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir(), cwd=dist)
    assert said.count("PASSED") == 2


def test_the_wheel_works_in_an_empty_environment(dist: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python, pinned = tmp_path / "env/bin/python", ROOT / "constraints.txt"
    pip = (python, "-m", "pip", "install", "--quiet", "-c", pinned)
    run(*pip, "torch", "torchvision", cwd=tmp_path)
    run(*pip, next(dist.glob("*.whl")), cwd=tmp_path)
    where = run(python, "-c", "import st_align; print(st_align.__file__)", cwd=tmp_path)
    assert str(tmp_path / "env") in where
    said = run(tmp_path / "env/bin/st-align", "demo", "--out", "demo", cwd=tmp_path)
    assert "never seen in training" in said
    assert (tmp_path / "demo/report.html").stat().st_size > 10_000
