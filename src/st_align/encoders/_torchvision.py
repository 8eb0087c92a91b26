"""One place that imports timm.

timm imports torchvision, whose wheel from the package registry is built for CUDA: beside a CPU
build of torch its compiled operators do not load, and the plain import fails when it attaches
the meta kernels of `nms`. Declaring the two operators first lets everything that is written in
Python work; the operators themselves are never called here.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@cache
def _declare_operators() -> Any:
    """The declarations live as long as the object does, hence the cache."""
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    library.define("nms" + _NMS)
    library.define("qnms" + _NMS)
    return library


def import_timm() -> Any:
    """The timm module, with a torchvision that works beside any torch."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare_operators()
    import timm

    return timm
