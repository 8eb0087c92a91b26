"""A frozen image encoder at a physical field of its own, in place of the corpus's patches."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from st_align.encoders._images import FrozenImages
from st_align.encoders.base import Encoded, FrozenEncoder, Modality
from st_align.errors import ConfigError


class FieldEncoder:
    """The `FrozenEncoder` `encoder`, to be given squares of `patch_um` micrometres that are cut
    from the slide's image at `side` pixels, the resolution the network reads.

    Its fingerprint differs from the encoder's, and from that of any other field.
    """

    modality: Modality = "image"

    def __init__(self, encoder: FrozenImages, patch_um: float) -> None:
        pixels = encoder.pixels
        self.encoder, self.patch_um = encoder, patch_um
        self.name, self.n_tokens, self.dim = encoder.name, encoder.n_tokens, encoder.dim
        self.side = pixels.shortest or pixels.side
        """None where the network reads any: as many pixels as the corpus's patches have."""
        content = f"{encoder.fingerprint}, squares of {patch_um:g} um"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:12]

    def encode_images(self, patches: NDArray[np.uint8]) -> Encoded:
        """As the encoder does."""
        return self.encoder.encode_images(patches)

    def encode_genes(self, *args: Any) -> Encoded:
        """Not possible: it reads images."""
        return self.encoder.encode_genes(*args)


def sees(encoder: FrozenEncoder) -> str:
    """What an image encoder is given, in words."""
    if isinstance(encoder, FieldEncoder):
        size = "as many pixels as the corpus's patches have"
        if encoder.side is not None:
            size = f"{encoder.side} px ({encoder.patch_um / encoder.side:.3g} um/px)"
        return f"squares of {encoder.patch_um:g} um cut from each slide's own image, {size}"
    if not isinstance(encoder, FrozenImages):
        return "the corpus's patches"
    side = encoder.pixels.shortest or encoder.pixels.side
    return f"the corpus's patches, {'as they are' if side is None else f'resized to {side} px'}"


def with_field(encoder: FrozenEncoder, patch_um: float | None) -> FrozenEncoder:
    """The encoder at a field of `patch_um`; as it is for None. One that reads no images, and a
    field without size, are a ConfigError.
    """
    if patch_um is None:
        return encoder
    if not isinstance(encoder, FrozenImages):
        raise ConfigError(
            f"encoder {encoder.name!r} reads {encoder.modality}s: it has no field of view",
            fix="leave out patch_um, or name an image encoder",
        )
    if not 1 <= patch_um <= 10_000:
        raise ConfigError("patch_um is out of range", expected="1 to 10,000", found=f"{patch_um:g}")
    return FieldEncoder(encoder, patch_um)
