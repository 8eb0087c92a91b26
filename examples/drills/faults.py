"""Break what can break around ST-Align, on simulated slides, and say what came of it.

python examples/drills/faults.py WORK [--only NAME]...

Every drill compares with an undisturbed run, byte for byte. Disks that are full or read-only are
file systems in memory, mounted where nobody else sees them: `unshare -rm` has to be permitted.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

KILLS, SLIDES, SPOTS = 20, 6, 250
FRESH = ("metrics.jsonl", "provenance.json")
"""Files of a run that hold times and commands."""
PLACED = ("sources.json",)
"""Says where the sources lie as seen from the corpus: other in a corpus of another depth."""


def st_align(*arguments: object) -> list[str]:
    """The command."""
    return [sys.executable, "-m", "st_align.cli", *map(str, arguments)]


def run(*arguments: object) -> str:
    """What a command says that has to end well."""
    done = subprocess.run(st_align(*arguments), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(map(str, arguments))}\n{done.stderr[-2000:]}")
    return done.stdout


def refused(*arguments: object) -> str:
    """A command that has to end with exit code 2 and one message; its first lines."""
    done = subprocess.run(st_align(*arguments), capture_output=True, text=True)
    message = done.stderr[done.stderr.rfind("error: ") :]
    if done.returncode != 2 or "Traceback" in done.stderr or not message:
        raise SystemExit(f"exit {done.returncode}, not 2:\n{done.stderr[-2000:]}")
    return "; ".join(line.strip() for line in message.splitlines()[:3])


def tree(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Every file of a folder and its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in leave_out
    }


def require_equal(one: Path, two: Path, leave_out: tuple[str, ...] = ()) -> None:
    """End the drills when two folders are not the same."""
    first, second = tree(one, leave_out), tree(two, leave_out)
    differ = [name for name in {*first, *second} if first.get(name) != second.get(name)]
    if differ or not first:
        raise SystemExit(f"{one} and {two} differ: {differ or 'both empty'}")


class Disk:
    """A file system in memory of a few megabytes, which can grow and be made read-only."""

    def __init__(self, place: Path, megabytes: float) -> None:
        self.place = place
        place.mkdir(parents=True)
        self._mount("-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs")

    def change(self, options: str) -> None:
        """Another size, or `ro`, or `rw`."""
        self._mount("-o", f"remount,{options}")

    def _mount(self, *arguments: str) -> None:
        subprocess.run(["mount", *arguments, str(self.place)], check=True)


class Drills:
    """Each method is a drill; it returns what came of it."""

    def __init__(self, work: Path) -> None:
        self.work, self.rng = work, np.random.default_rng(0)
        self.source, self.corpus = work / "source", work / "corpus"
        run("simulate", "--out", self.source, "--slides", SLIDES, "--spots", SPOTS)
        self.prepare = [
            "prepare",
            self.source / "slides",
            "--patients",
            self.source / "patients.csv",
        ]
        self.train = ["--epochs", 2, "--batch", 128]
        start = time.perf_counter()
        run(*self.prepare, "--out", self.corpus)
        self.prepare_s = time.perf_counter() - start

    @cached_property
    def model(self) -> Path:
        """The undisturbed run, of the corpus `as-trained`, which has its features."""
        shutil.copytree(self.corpus, self.work / "as-trained")
        run("train", self.work / "as-trained", "--out", self.work / "run", *self.train)
        return self.work / "run"

    def prepare_killed(self) -> str:
        """SIGKILL at random moments, one process."""
        return self._killed(jobs=1)

    def prepare_killed_with_two_jobs(self) -> str:
        """The same with `--jobs 2`."""
        return self._killed(jobs=2)

    def _killed(self, jobs: int) -> str:
        """SIGKILL at random moments, each time in a corpus of its own; then the same command."""
        died, done = 0, []
        for number in range(KILLS):
            out = self.work / f"killed-{jobs}-{number}"
            command = [*self.prepare, "--out", out, "--jobs", jobs]
            with subprocess.Popen(st_align(*command), stderr=subprocess.DEVNULL) as process:
                time.sleep(self.rng.uniform(0.2, 1) * self.prepare_s)
                process.kill()
            died += process.returncode < 0
            done.append(len(list(out.glob("slides/[!.]*/slide.json"))))
            run(*command)
            require_equal(out, self.corpus)
            shutil.rmtree(out)
        return f"{died} of {KILLS} died, with {min(done)} to {max(done)} of {SLIDES} slides done"

    def disk_full_in_prepare(self) -> str:
        """Room for about half of the slides."""
        need = sum(p.stat().st_size for p in self.corpus.rglob("*")) / 2**20
        disk = Disk(self.work / "full-prepare", 0.6 * need)
        command = [*self.prepare, "--out", disk.place / "corpus"]
        said = refused(*command)
        left = len(list(disk.place.glob("corpus/slides/[!.]*")))
        disk.change(f"size={int(4 * need)}m")
        run(*command)
        require_equal(disk.place / "corpus", self.corpus, PLACED)
        return f"{said}; {left} of {SLIDES} slides kept, and the rest after making room"

    def disk_full_in_features(self) -> str:
        """Room for the corpus and half of its features."""
        whole = self.model.parent / "as-trained"
        need = sum(p.stat().st_size for p in self.corpus.rglob("*")) / 2**20
        features = sum(p.stat().st_size for p in whole.rglob("*.npy")) / 2**20 - need
        disk = Disk(self.work / "full-features", need + max(features, 1) * 0.5)
        shutil.copytree(self.corpus, disk.place / "corpus")
        command = ["features", disk.place / "corpus", "--encoder", "efficientnet-lite0"]
        said = refused(*command)
        disk.change(f"size={int(4 * (need + features)) + 10}m")
        run(*command)
        for one in whole.rglob("features/*/*.npy"):
            two = disk.place / "corpus" / one.relative_to(whole)
            if one.read_bytes() != two.read_bytes():
                raise SystemExit(f"{two} differs")
        return f"{said}; equal after making room"

    def disk_full_in_train(self) -> str:
        """Room for the first checkpoint, not for the last."""
        weights = (self.model / "model.safetensors").stat().st_size / 2**20
        disk = Disk(self.work / "full-train", 3.5 * weights)
        out = disk.place / "run"
        said = refused("train", self.work / "as-trained", "--out", out, *self.train)
        run("inspect", out)
        disk.change(f"size={int(12 * weights)}m")
        run("train", self.work / "as-trained", "--out", out, *self.train, "--resume")
        require_equal(out, self.model, FRESH)
        return f"{said}; the run folder stayed usable, --resume ended in the same bytes"

    def checkpoint_damaged(self) -> str:
        """One bit of the newest resume point flipped."""
        out = self.work / "damaged"
        shutil.copytree(self.model, out)
        newest = sorted((out / "trainer").iterdir())[-1]
        path = newest / "optimizer.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        command = ["train", self.work / "as-trained", "--out", out, *self.train, "--resume"]
        said = run(*command).splitlines()
        require_equal(out, self.model, FRESH)
        return "; ".join(said[:2]) + "; the end is the same, byte for byte"

    def corpus_read_only(self) -> str:
        """Training and embedding from a corpus nobody can write to."""
        disk = Disk(self.work / "read-only", 200)
        corpus, out = disk.place / "corpus", self.work / "from-read-only"
        shutil.copytree(self.corpus, corpus)
        disk.change("ro")
        said = refused("train", corpus, "--out", out, *self.train)
        disk.change("rw")
        run("features", corpus, "--encoder", "efficientnet-lite0")
        disk.change("ro")
        run("train", corpus, "--out", out, *self.train)
        require_equal(out, self.model, FRESH)
        run("embed", f"{corpus}::P1_S1", "--model", out, "--out", self.work / "ro.h5ad")
        return f"without features: {said}; with them train and embed work"

    def names_and_moves(self) -> str:
        """Everything in folders with spaces and letters of three alphabets, moved half-way."""
        first, second = self.work / "Gewebe, süß", self.work / "組織 100% 'образец'"
        shutil.copytree(self.source, first / "Quelle 1")
        patients = ["--patients", first / "Quelle 1" / "patients.csv"]
        run("prepare", first / "Quelle 1" / "slides", *patients, "--out", first / "Korpus ä")
        require_equal(first / "Korpus ä", self.corpus, PLACED)
        first.rename(second)
        corpus, out = second / "Korpus ä", second / "Lauf ñ"
        run("train", corpus, "--out", out, *self.train)
        require_equal(out, self.model, FRESH)
        third = self.work / "moved again"
        second.rename(third)
        shutil.rmtree(sorted((third / "Lauf ñ" / "trainer").iterdir())[-1])
        run("train", third / "Korpus ä", "--out", third / "Lauf ñ", *self.train, "--resume")
        require_equal(third / "Lauf ñ", self.model, FRESH)
        run("embed", third / "Korpus ä", "--model", third / "Lauf ñ", "--out", third / "Ё")
        file = sorted((third / "Ё").iterdir())[0]
        run("domains", file, "--n-domains", 4)
        run("report", file, "--out", third / "Bericht ö.html")
        return "prepare, train, move, resume, embed, domains, report"


def main() -> None:
    """Run the drills asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="a new folder")
    names = [name for name, what in vars(Drills).items() if name[0] != "_" and callable(what)]
    parser.add_argument("--only", action="append", choices=names)
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    drills = Drills(options.work.resolve())
    for name in options.only or names:
        drill: Callable[[], str] = getattr(drills, name)
        start = time.perf_counter()
        print(f"{name}: {drill()} ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    if "--inside" not in sys.argv:
        inside = shlex.join([sys.executable, *sys.argv, "--inside"])
        sys.exit(subprocess.run(["unshare", "-rm", "sh", "-c", inside]).returncode)
    sys.argv.remove("--inside")
    main()
