"""Frozen image networks: pixels in, tokens and a pooled vector out, in one place for all of them.

Shape letters: B patches of side p, s side of a network's input, D its width, h x w its last map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from st_align.encoders._layout import Layout, fits, place
from st_align.encoders._weights import fingerprint, read_state_dict
from st_align.encoders.base import Encoded, EncoderInfo, FrozenEntry, Modality, register
from st_align.encoders.lookup import weights_file

if TYPE_CHECKING:
    from st_align.expression import Genes

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
LIBRARIES = ("timm", "torchvision")

_GRID = 4

Colours = tuple[float, float, float]
Maps = tuple[Tensor, Tensor]
"""The last map [B, D, h, w], and the vector [B, D] that upstream calls the features."""
Read = Callable[[Any, Tensor], Maps]
"""Run a network on pixels [B, 3, s, s]."""


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """How patches become what a network was trained on; as upstream does it to one PIL image."""

    colours: tuple[Colours, Colours]
    """Mean and standard deviation of red, green and blue, of values in 0 to 1."""
    side: int | None = None
    """Of the network's input in pixels; None reads patches as they come."""
    shortest: int | None = None
    """The shorter side is resized to it before the centre is cut out; None: to `side`."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    stretch: bool = False
    """Resize both sides to `side`, whatever that does to the proportions."""

    def read(self, patches: NDArray[np.uint8], device: torch.device) -> Tensor:
        """RGB patches [B, height, width, 3] -> float32 pixels [B, 3, s, s]."""
        pixels = torch.tensor(patches).permute(0, 3, 1, 2)
        if self.side is not None:
            pixels = self.resized(pixels, self.side)
        height, width = pixels.shape[2:]
        mean, sd = (255 * torch.tensor(c, device=device).repeat(width) for c in self.colours)
        # By lines of pixels: a loop over three channels costs several times more.
        lines = pixels.permute(0, 2, 3, 1).to(device).float().reshape(-1, height, 3 * width)
        return lines.sub_(mean).div_(sd).view(-1, height, width, 3).permute(0, 3, 1, 2)

    def resized(self, pixels: Tensor, side: int) -> Tensor:
        """uint8 [B, 3, height, width] -> uint8 [B, 3, side, side], antialiased as PIL does it."""
        height, width = pixels.shape[2:]
        shorter = self.shortest or side
        longer = int(shorter * max(height, width) / min(height, width))
        size = (shorter, longer) if height < width else (longer, shorter)
        size = (side, side) if self.stretch else size
        if size != (height, width):
            pixels = F.interpolate(pixels, size=size, mode=self.interpolation, antialias=True)
        top, left = (round((length - side) / 2) for length in size)
        return pixels[:, :, top : top + side, left : left + side]


class FrozenImages:
    """The `FrozenEncoder` of an image network: tokens [B, 16, D] are means of a 4 x 4 grid of its
    last map, pooled [B, D] is upstream's feature vector.

    Runs on the GPU where there is one, there in bfloat16; returns float32 of the CPU.
    """

    modality: Modality = "image"
    n_tokens = _GRID * _GRID

    def __init__(
        self,
        name: str,
        build: Callable[[], nn.Module],
        read: Read,
        *,
        pixels: Pixels,
        dim: int,
        mark: str,
    ) -> None:
        """`build` gives the network when the first patch is read: never, where all features are
        cached. `mark`: the fingerprint of weights and preprocessing.
        """
        self.name, self.dim, self.fingerprint, self.pixels = name, dim, mark, pixels
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._build, self._read = build, read

    @cached_property
    def _network(self) -> nn.Module:
        network = _fold_batch_norm(self._build().eval().requires_grad_(False))
        return network.to(self._device)

    def encode_images(self, patches: NDArray[np.uint8]) -> Encoded:
        """RGB patches [B, p, p, 3] -> float32 tokens [B, 16, D] and pooled [B, D]."""
        last, pooled = self.maps(patches)
        tokens = F.adaptive_avg_pool2d(last, _GRID).flatten(2).transpose(1, 2)
        return Encoded(tokens.contiguous().cpu(), pooled.cpu())

    @torch.no_grad()
    def maps(self, patches: NDArray[np.uint8]) -> Maps:
        """RGB patches [B, p, p, 3] -> the last map [B, D, h, w] and pooled [B, D], float32."""
        pixels = self.pixels.read(patches, self._device)
        half = self._device.type == "cuda"
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=half):
            last, pooled = self._read(self._network, pixels)
        return last.float(), pooled.float()

    def encode_genes(
        self, counts: Any, genes: Genes, total_umi: NDArray[np.float64], rng: np.random.Generator
    ) -> Encoded:
        """Not possible: it reads images."""
        raise TypeError(f"{self.name} reads images")


@dataclass(frozen=True, kw_only=True)
class ImageFamily:
    """A published image encoder: how it is built, run and fed, and how its file names things."""

    name: str
    info: EncoderInfo
    pixels: Pixels
    dim: int
    build: Callable[[], nn.Module]
    """The network without weights; called where new tensors get no memory (device `meta`)."""
    read: Read
    layouts: tuple[Layout, ...] = (Layout(),)

    def register(self) -> None:
        """Make it known by its name."""
        register(
            FrozenEntry(
                name=self.name,
                modality="image",
                info=self.info,
                load=self.load,
                recognises=self.recognises,
            )
        )

    def load(self, weights: Path | None) -> FrozenImages:
        """The encoder with a published file; a file that does not fit is a ModelError.

        Tensors of the file become those of the network without a copy, and stay in the file until
        they are read, where its format allows it.
        """
        path = weights_file(weights, self.info, self.name)
        tensors = read_state_dict(path, mapped=True)
        network = self._blank()
        placed = place(tensors, network.state_dict(), path, self.name, self.layouts)
        network.load_state_dict(placed, strict=False, assign=True)  # place() was strict
        mark = fingerprint(path, f"{self.pixels}, {_GRID} x {_GRID} means")
        return FrozenImages(
            self.name, lambda: network, self.read, pixels=self.pixels, dim=self.dim, mark=mark
        )

    def recognises(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the tensors of some file are this encoder's."""
        return fits(tensors, self._shapes, self.layouts)

    @cached_property
    def _shapes(self) -> dict[str, Tensor]:
        """The network's tensors, without memory."""
        return {name: tensor.to("meta") for name, tensor in self._blank().state_dict().items()}

    def _blank(self) -> nn.Module:
        with torch.device("meta"):
            return self.build()


def class_token(vit: Any, pixels: Tensor) -> Maps:
    """Of a timm vision transformer: patch tokens as a map, and the class token."""
    tokens = vit.forward_features(pixels)
    return as_map(tokens[:, vit.num_prefix_tokens :]), tokens[:, 0]


def mean_of_map(network: Any, pixels: Tensor) -> Maps:
    """Of a timm convolutional network: its last map, and the mean of it."""
    last = network.forward_features(pixels)
    return last, last.mean(dim=(2, 3))


def as_map(tokens: Tensor) -> Tensor:
    """Tokens [B, n * n, D] of a square, row by row -> [B, D, n, n]."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)


def _fold_batch_norm(network: nn.Module) -> nn.Module:
    """Put every batch norm into the convolution before it, for speed; same function."""
    convolution = ""
    for name, child in list(network.named_children()):
        if isinstance(child, nn.Conv2d):
            convolution = name
        elif isinstance(child, nn.BatchNorm2d):
            setattr(network, convolution, fuse_conv_bn_eval(getattr(network, convolution), child))
            # timm keeps some activations in the norm
            setattr(network, name, getattr(child, "act", nn.Identity()))
        else:
            _fold_batch_norm(child)
    return network
