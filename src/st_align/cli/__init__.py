"""The command `st-align`: verbs only. Each parses its options, calls the core and prints.

Nothing heavy is imported before a verb runs: `st-align --help` stays fast. A new verb is a function
in one of the files beside this one, or a file of its own named in `_VERBS`.
"""

from __future__ import annotations

import errno
import os
import sys

from st_align.cli import (
    annotate,
    bench,
    bench_ablation,
    bench_genes,
    bench_hest,
    bench_retrieval,
    bench_speed,
    corpora,
    genes,
    retrieve,
    slides,
    start,
    view,
)
from st_align.cli.app import app

__all__ = ["app", "main"]

_VERBS = (
    start,
    corpora,
    slides,
    genes,
    annotate,
    retrieve,
    view,
    bench,
    bench_genes,
    bench_hest,
    bench_retrieval,
    bench_speed,
    bench_ablation,
)
"""Files of verbs: each adds its own to `app` when it is imported."""


def main() -> None:
    """Entry point: user errors end with one message and exit 2, never with a traceback."""
    orderly = True
    try:
        app()
    except Exception as error:
        orderly = False
        if os.environ.get("ST_ALIGN_DEBUG"):
            raise
        sys.exit(_fail(error))
    finally:
        if job := sys.modules.get("st_align.job"):  # not imported: there are no ranks
            job.leave(orderly=orderly)


def _fail(error: Exception) -> int:
    from st_align.errors import StAlignError

    if isinstance(error, StAlignError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _DISK):
        print(f"error: {error.strerror}: {error.filename or 'the output'}", file=sys.stderr)
        return 2
    print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
    print(
        "  to do:    this was not expected; ST_ALIGN_DEBUG=1 shows where it happened",
        file=sys.stderr,
    )
    return 1


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors that a write raises without the name of its file."""
