"""The docs hold: commands on tutorial and how-to pages run, options exist, pages build, and what
says a version or a Python says the same one everywhere.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

import st_align

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("tutorials/*.md"), *DOCS.glob("how-to/*.md")])
FAST = {"your-visium-folder", "give-the-right-image", "scanpy-and-squidpy"}
"""Pages whose commands take seconds."""
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>.+?) -->\n)?^```(?P<language>bash|python)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    why_not_run: str | None


def blocks(page: Path) -> list[Block]:
    found = _BLOCK.finditer(page.read_text())
    return [Block(m["language"], m["code"], m["why"]) for m in found]


def run(code: list[str], cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(code, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{code[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def shell(folder: Path) -> dict[str, str]:
    """An environment in which `st-align` and `torchrun` are those of this source and Python."""
    folder.mkdir()
    for name, module in (("st-align", "st_align.cli"), ("torchrun", "torch.distributed.run")):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {module} "$@"\n')
        script.chmod(0o755)
    source = f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=() if page.stem in FAST else pytest.mark.slow)
        for page in PAGES
    ],
)
def test_what_a_page_says_to_run_runs(page: Path, tmp_path: Path) -> None:
    env, work = shell(tmp_path / "bin"), tmp_path / "work"
    work.mkdir()
    for block in blocks(page):
        if block.why_not_run is None:
            command = ["bash", "-euo", "pipefail", "-c"]
            run([*(command if block.language == "bash" else [sys.executable, "-c"]), block.code],
                work, env)  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_not_run_is_well_formed(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.code, page.name, "exec")
        else:
            run(["bash", "-n", "-c", block.code], ROOT)


def test_verbs_and_options_that_are_written_exist() -> None:
    """In every block of every page and of the README, those that are not run too."""
    import typer

    from st_align.cli import app

    root = typer.main.get_command(app)
    seen = 0
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]:
        for block in blocks(page):
            for words in commands(block.code):
                command, rest = root, words[1:]
                while rest and hasattr(command, "commands") and rest[0] in command.commands:
                    command, rest = command.commands[rest[0]], rest[1:]
                assert not hasattr(command, "commands") or rest[:1] in ([], ["--help"]), words
                known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
                used = {w.split("=")[0] for w in rest if w.startswith("--")} - {"--help"}
                assert used <= known, f"{page.name}: {shlex.join(words)}: {used - known}"
                seen += 1
    assert seen > 40


def test_every_verb_is_in_the_reference_and_in_the_changes() -> None:
    from st_align.schemas import names

    for verb in (name.replace("-", " ", 1) for name in names()):
        for page in (DOCS / "cli.md", ROOT / "CHANGELOG.md"):
            assert re.search(rf"`{verb}\b", page.read_text()), f"{page.name}: {verb}"


def commands(code: str) -> list[list[str]]:
    """The `st-align ...` commands of a shell block, as words."""
    lines = re.sub(r"\\\n", " ", code).splitlines()
    said = [re.split(r" [|;&]|\s#", line.strip().removeprefix("$ "))[0] for line in lines]
    return [shlex.split(line) for line in said if line.startswith("st-align ")]


def test_the_example_of_an_encoder_registers(tmp_path: Path) -> None:
    example = next(b for b in blocks(ROOT / "CONTRIBUTING.md") if b.language == "python")
    asked = "from st_align.encoders.base import find\nprint(find('resnet34').info.title)"
    said = run([sys.executable, "-c", f"{example.code}\n{asked}"], tmp_path, shell(tmp_path / "b"))
    assert said.strip() == "ResNet-34, ImageNet"


def test_links_between_files_lead_somewhere() -> None:
    """Where no docs builder looks: links of the README and of what lies beside it."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), target


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = st_align.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    tested = re.findall(r'"(3\.\d+)"', workflow)
    said = [c.rsplit(" ", 1)[1] for c in project["classifiers"] if "Python :: 3." in c]
    assert tested == said
    assert project["requires-python"] == f">={tested[0]}"


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the docs extra is not installed")
    pytest.importorskip("furo", reason="the docs extra is not installed")
    env = shell(tmp_path / "bin")
    run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html",
         "-d", str(tmp_path / "trees"), str(DOCS), str(tmp_path / "html")],
        ROOT, env,
    )  # fmt: skip
    page = (tmp_path / "html/method.html").read_text()
    assert page.count('class="equation"') == 8
    assert not re.search(r'(?:src|href)="https?://[^"]*\.(?:js|css|woff2?)"', page)
    shutil.rmtree(tmp_path / "html")
