"""Readers: one module per source format, each gives validated slides."""

from __future__ import annotations

from st_align.io.check import check_slide
from st_align.io.detect import find_slides, read_one
from st_align.io.refs import Found, ReadOptions, SlideRef

__all__ = ["Found", "ReadOptions", "SlideRef", "check_slide", "find_slides", "read_one"]
