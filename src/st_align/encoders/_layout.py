"""From the tensors of a published file to those of a network: renamed, joined, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from st_align.encoders.base import FrozenEntry, registered
from st_align.errors import ModelError

_COUNTERS = "num_batches_tracked"
"""Of batch norms, for training only: old files lack them."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a published file names the tensors of a network; by default as the network does."""

    renames: Mapping[str, str] = field(default_factory=dict)
    """Regular expressions for the network's names and what stands there in the file, applied one
    after the other. A `*` in the result stands for each of `parts`: several tensors of the file,
    joined along their first axis, are one of the network."""
    parts: tuple[str, ...] = ()
    unneeded: tuple[str, ...] = ()
    """Regular expressions for the starts of names in the file that features do not depend on."""

    def names(self, own: str) -> tuple[str, ...]:
        """The file's names for the network's tensor `own`."""
        for mine, theirs in self.renames.items():
            own = re.sub(mine, theirs, own)
        return tuple(own.replace("*", part) for part in self.parts) if "*" in own else (own,)

    def problems(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Problems:
        """What keeps `tensors` of a file from being those of the network `own`."""
        names = {name: self.names(name) for name in own if not name.endswith(_COUNTERS)}
        needed = {name for group in names.values() for name in group}
        return Problems(
            missing=[name for group in names.values() for name in group if name not in tensors],
            unexpected=[n for n in tensors if n not in needed and not self._unneeded(n)],
            shapes=[
                f"{' + '.join(group)} is {_text(shape)}, not {_text(own[name].shape)}"
                for name, group in names.items()
                if all(n in tensors for n in group)
                and _bare(shape := _joined([tensors[n].shape for n in group]))
                != _bare(own[name].shape)
            ],
        )

    def _unneeded(self, name: str) -> bool:
        return name.endswith(_COUNTERS) or any(re.match(start, name) for start in self.unneeded)


@dataclass(frozen=True, kw_only=True)
class Problems:
    """Names of a file's tensors, and words on those of another shape."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.shapes)

    def __str__(self) -> str:
        groups = (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.shapes),
        )
        return "; ".join(f"{len(names)} {word}: {_some(names)}" for word, names in groups if names)


def place(
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    path: Path,
    name: str,
    layouts: Sequence[Layout] = (Layout(),),
) -> dict[str, Tensor]:
    """`tensors` of the file under the names and in the shapes of `own`, float32; a ModelError
    says what does not fit, and of which encoder the file is.

    Axes of length 1 in front do not count as shape. Of several layouts the best fitting is taken.
    """
    layout = min(layouts, key=lambda one: len(one.problems(tensors, own)))
    problems = layout.problems(tensors, own)
    if problems:
        others = [n for n in _recognised(tensors) if n != name]
        raise ModelError(
            f"{path} is not a checkpoint of {name}",
            expected=f"{len(own)} tensors, {layout.names(next(iter(own)))[0]} the first",
            found=str(problems),
            fix=f"it is one of {' or '.join(others)}: give it to that encoder" if others else None,
        )
    return {
        mine: _join([tensors[n] for n in layout.names(mine)]).reshape(tensor.shape)
        for mine, tensor in own.items()
        if not mine.endswith(_COUNTERS)
    }


def fits(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], layouts: Sequence[Layout]
) -> bool:
    """Whether `tensors` of a file are those of the network `own` in one of its layouts."""
    return any(not layout.problems(tensors, own) for layout in layouts)


def _recognised(tensors: Mapping[str, Tensor]) -> list[str]:
    frozen = (entry for entry in registered().values() if isinstance(entry, FrozenEntry))
    return [entry.name for entry in frozen if entry.recognises(tensors)]


def _join(parts: Sequence[Tensor]) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts))).float()


def _joined(shapes: Sequence[torch.Size]) -> tuple[int, ...]:
    first = shapes[0]
    return tuple(first) if len(shapes) == 1 else (sum(s[0] for s in shapes), *first[1:])


def _bare(shape: Sequence[int]) -> tuple[int, ...]:
    start = next((i for i, n in enumerate(shape) if n != 1), len(shape))
    return tuple(shape[start:])


def _text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
