"""Sources to a corpus: resumable, in parallel, and never half-written.

A slide is written to a hidden temporary folder, synced, and renamed whole; the manifest is put
together from the finished slides at the end. So a corpus depends on what was asked for and not on
the order of the work, the number of jobs or how often it was killed.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from st_align.cluster import on_cluster
from st_align.corpus import (
    MANIFEST,
    QUARANTINE,
    RECORD,
    SOURCES,
    Corpus,
    is_corpus,
    read_json,
    read_manifest,
    read_record,
)
from st_align.corpus_files import (
    PART,
    Columns,
    locked,
    new_folder,
    niche_columns,
    remove,
    slide_columns,
    slide_entry,
    write_columns,
    write_json,
    write_manifest,
    write_record,
    writing,
)
from st_align.errors import CorpusError, OutputError, StAlignError
from st_align.geometry import parse_niche_spec
from st_align.io.refs import SlideRef, fingerprint
from st_align.prepare import NICHE_PX, SPOT_PX, cut_niche, prepare_slide, slide_warnings

_WITHHELD = (
    "what an earlier preparation made of it is kept but not listed: it was asked for otherwise"
)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One slide to prepare, or only some niches of it where `record` is what was done before."""

    ref: SlideRef
    folder: Path
    request: str
    specs: tuple[str, ...]
    record: dict[str, Any] | None
    spot_px: int
    niche_px: int


def build_corpus(
    refs: Sequence[SlideRef],
    out: Path,
    *,
    niche_specs: Sequence[str] = ("lattice",),
    spot_px: int = SPOT_PX,
    niche_px: int = NICHE_PX,
    jobs: int = 1,
    dask: str | None = None,
    absent: Mapping[str, str] | None = None,
    progress: bool = True,
) -> Corpus:
    """Prepare slides into the corpus `out`, which may exist: it is resumed and added to.

    A slide that is complete and whose source and options did not change is skipped; a niche spec
    that it lacks is added to it. A slide that fails is named in `quarantine.json` with the reason,
    as are those of `absent` (id -> reason), and the rest go on. `jobs` processes work at once, or
    the workers of the Dask scheduler at the address `dask`, which see the same files.
    What an earlier call made of a slide that fails now is listed only if it was asked for in the
    same way: it might hold another patient than the one now given.

    An `out` that cannot be written, or is something else, is an OutputError; other patch sizes,
    another schema version, an id that another source has taken and no slide left are a
    CorpusError.
    """
    for spec in niche_specs:
        parse_niche_spec(spec)
    existed = out.exists()
    with writing(out):
        _begin(out, spot_px, niche_px)
        with locked(out, wait=False):
            _sweep(out)
            tasks = _tasks(refs, out, tuple(niche_specs), spot_px=spot_px, niche_px=niche_px)
            failed = _work(tasks, jobs, dask, progress)
            failed |= {i: reason for i, reason in (absent or {}).items() if i not in failed}
            finished = {folder.name: read_record(folder / RECORD) for folder in _finished(out)}
            if not finished:
                _abandon(out, existed)
                raise _none_left(failed)
            done = {ref.id for ref in refs} - set(failed)
            slides = _list(out, finished, tasks, failed, done)
            write_manifest(out, slides, spot_px=spot_px, niche_px=niche_px)
            _keep_sources(out, refs)
            if not slides:
                raise _none_left(failed)
    return Corpus.open(out)


def _list(
    out: Path,
    finished: Mapping[str, dict[str, Any]],
    tasks: Sequence[_Task],
    failed: Mapping[str, str],
    done: Set[str],
) -> dict[str, Any]:
    """Entries of the slides that the manifest may list; the others go to the quarantine.

    One withheld stays so, whatever else is prepared, until it is prepared itself.
    """
    listed, before = read_manifest(out)["slides"], _quarantined(out)
    asked = {task.ref.id: task.request for task in tasks}
    withheld = (set(before) - set(listed) - done) & set(finished)
    withheld |= {i for i in set(failed) & set(finished) if finished[i]["request"] != asked.get(i)}
    reasons = {i: reason for i, reason in before.items() if i not in done} | {
        i: f"{reason}; {_WITHHELD}" if i in withheld else reason for i, reason in failed.items()
    }
    write_json(out / QUARANTINE, reasons)
    return {i: record["slide"] for i, record in finished.items() if i not in withheld}


def _begin(out: Path, spot_px: int, niche_px: int) -> None:
    """Make a new corpus, or check that `out` is one this call can add to."""
    if is_corpus(out):
        known = read_manifest(out)
        for name, asked in (("spot_px", spot_px), ("niche_px", niche_px)):
            if known.get(name) != asked:
                raise CorpusError(
                    f"the corpus {out} was prepared with another {name}",
                    expected=str(known.get(name)),
                    found=str(asked),
                    fix=f"prepare with {name} {known.get(name)}, or into a new folder",
                )
        return
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {out} is a file", expected="a folder")
    if out.is_dir() and any(not entry.name.endswith(PART) for entry in out.iterdir()):
        raise OutputError(
            f"the output {out} is neither empty nor a corpus",
            expected=f"a new or empty folder, or one with {MANIFEST}",
            fix="choose another --out",
        )
    out.mkdir(parents=True, exist_ok=True)
    write_manifest(out, {}, spot_px=spot_px, niche_px=niche_px)


def _tasks(
    refs: Sequence[SlideRef], out: Path, specs: tuple[str, ...], *, spot_px: int, niche_px: int
) -> list[_Task]:
    """What is left to do."""
    tasks = []
    for ref in refs:
        folder, request = out / "slides" / ref.id, fingerprint(ref)
        record = read_record(folder / RECORD) if (folder / RECORD).is_file() else None
        if record and record["slide"]["source"] != _source(ref):
            raise _taken(out, ref, record["slide"])
        known = tuple(record["slide"]["niches"]) if record else ()
        if record and record["request"] == request:
            asked = tuple(sorted(set(specs) - set(known)))
        else:
            record, asked = None, tuple(sorted({*specs, *known}))
        if asked:
            tasks.append(
                _Task(
                    ref=ref,
                    folder=folder,
                    request=request,
                    specs=asked,
                    record=record,
                    spot_px=spot_px,
                    niche_px=niche_px,
                )
            )
    return tasks


def _work(tasks: Sequence[_Task], jobs: int, dask: str | None, progress: bool) -> dict[str, str]:
    """Run all tasks: the slides that failed, with reasons. OutputError ends the work."""
    from tqdm import tqdm

    bar = tqdm(total=len(tasks), desc="prepare", unit="slide", disable=not progress)
    failed: dict[str, str] = {}
    with bar:
        outcomes = _outcomes(tasks, jobs) if dask is None else on_cluster(_prepare, tasks, dask)
        for task, reason in outcomes:
            if reason is not None:
                failed[task.ref.id] = reason
            bar.update()
    return dict(sorted(failed.items()))


def _outcomes(tasks: Sequence[_Task], jobs: int) -> Iterator[tuple[_Task, str | None]]:
    if jobs == 1 or len(tasks) < 2:
        yield from ((task, _prepare(task)) for task in tasks)
        return
    # Forking a process that has threads (PyTorch, Arrow) can hang; spawn starts clean.
    pool = ProcessPoolExecutor(
        min(jobs, len(tasks)), mp_context=get_context("spawn"), initializer=_end_with_parent
    )
    try:
        futures = {pool.submit(_prepare, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise CorpusError(
            "a process that prepared slides was killed",
            found="most often: not enough memory",
            fix="run again with a smaller --jobs: finished slides are kept",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Workers of a killed parent must not go on writing beside the next run."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _prepare(task: _Task) -> str | None:
    """Do one task; the reason if the slide cannot be prepared."""
    try:
        if task.record is None:
            entry, columns = _whole(task)
        else:
            entry, niches = _added(task, task.record)
    except Exception as error:  # readers meet files of any kind: one bad slide must not end all
        if isinstance(error, StAlignError):
            reason = error.one_line()
        else:
            reason = f"{type(error).__name__}: {error}"
        source = task.ref.source
        return reason.replace(str(source), source.name) if source.is_absolute() else reason
    if task.record is None:
        _forget_expression(task)
        with new_folder(task.folder, _bytes(columns)) as part:
            write_record(part, task.request, entry, write_columns(part, columns))
        return None
    sums = dict(entry["sha256"])
    for place, own in niches.items():
        with new_folder(task.folder / place, _bytes(own)) as part:
            sums |= {f"{place}/{name}": value for name, value in write_columns(part, own).items()}
    write_record(task.folder, task.request, entry, sums)
    return None


def _whole(task: _Task) -> tuple[dict[str, Any], Columns]:
    """Entry and columns of a slide."""
    slide = prepare_slide(task.ref.read(), task.specs, spot_px=task.spot_px, niche_px=task.niche_px)
    entry = slide_entry(slide, format=task.ref.format, source=_source(task.ref))
    return entry, slide_columns(slide)


def _added(task: _Task, record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Columns]]:
    """The entry of a slide that gets more niches, and the columns of each by its folder."""
    slide = task.ref.read()
    cut = {spec: cut_niche(slide, spec, niche_px=task.niche_px) for spec in task.specs}
    niches = sorted({*record["slide"]["niches"], *task.specs})
    entry = {"niches": niches, "warnings": list(slide_warnings(slide, niches))}
    columns = {f"niches/{spec}": niche_columns(niche) for spec, niche in cut.items()}
    return record["slide"] | entry, columns


def _bytes(columns: Columns) -> int:
    return sum(column.nbytes for column in columns.values())


def _sweep(out: Path) -> None:
    """Remove what a killed preparation left."""
    for pattern in (f".*{PART}", f"slides/.*{PART}", f"slides/*/niches/.*{PART}"):
        for left in out.glob(pattern):
            remove(left)


def _finished(out: Path) -> list[Path]:
    """Folders of complete slides, sorted by id."""
    folders = out.glob(f"slides/*/{RECORD}")
    return sorted(p.parent for p in folders if not p.parent.name.startswith("."))


def _quarantined(out: Path) -> dict[str, str]:
    path = out / QUARANTINE
    return read_json(path) if path.is_file() else {}


def _forget_expression(task: _Task) -> None:
    """Caches of a slide that is about to be replaced."""
    for panel in task.folder.parents[1].glob("expression/*"):
        (panel / f"{task.ref.id}.npy").unlink(missing_ok=True)


def _source(ref: SlideRef) -> str:
    """What a corpus says of where a slide comes from: a name that holds on any machine, be it of
    a link.
    """
    return Path(os.path.abspath(ref.source)).name


def _keep_sources(out: Path, refs: Sequence[SlideRef]) -> None:
    """Where slides were read from, as seen from the corpus: the image may be wanted again."""

    def seen(path: Path | None) -> str | None:
        return None if path is None else os.path.relpath(path, out)

    path = out / SOURCES
    places = {
        ref.id: {"path": seen(ref.source), "format": ref.format, "image": seen(ref.image)}
        for ref in refs
    }
    write_json(path, (read_json(path) if path.is_file() else {}) | places)


def _taken(out: Path, ref: SlideRef, entry: Mapping[str, Any]) -> CorpusError:
    return CorpusError(
        f"the corpus {out} has a slide {ref.id!r} from another source",
        expected=f"{entry['source']} ({entry['format']})",
        found=f"{ref.source} ({ref.format})",
        fix=f"rename one of the two, or delete {out / 'slides' / ref.id} to replace the slide",
    )


def _abandon(out: Path, existed: bool) -> None:
    """Leave no corpus behind that never held a slide."""
    for name in (MANIFEST, QUARANTINE, SOURCES):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "slides", ignore_errors=True)
    if not existed:
        out.rmdir()


def _none_left(failed: Mapping[str, str]) -> CorpusError:
    shown = "; ".join(f"{i}: {reason}" for i, reason in list(failed.items())[:5])
    return CorpusError(
        "no slide could be prepared",
        expected="one good slide at least",
        found=(shown or "no slides") + (f"; and {len(failed) - 5} more" if len(failed) > 5 else ""),
    )
