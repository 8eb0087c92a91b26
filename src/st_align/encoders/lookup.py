"""Where an encoder's weights lie: the one place that answers it, for every verb."""

from __future__ import annotations

import os
from pathlib import Path

from st_align.encoders.base import EncoderInfo, FrozenEncoder, FrozenEntry, registered
from st_align.errors import ModelError

ENV = "ST_ALIGN_WEIGHTS"
"""A folder with one subfolder or one file per encoder."""

_HUB = "hf:"
_SUFFIXES = (".bin", ".safetensors", ".pt", ".pth", ".ckpt")


def load_frozen(entry: FrozenEntry, given: str | Path | None) -> FrozenEncoder:
    """The encoder with the weights at `given`, or else where `find_weights` finds them; whatever
    is wrong is a ModelError.
    """
    try:
        return entry.load(find_weights(entry, given))
    except ImportError as error:
        raise ModelError(
            f"encoder {entry.name!r} needs a library that cannot be imported",
            expected=", ".join(entry.info.requires),
            found=str(error),
            fix=f"pip install {error.name or 'it'}",
        ) from error


def find_weights(entry: FrozenEntry, given: str | Path | None) -> Path | None:
    """The file or folder of the encoder's weights; None where none are given, or none needed.

    `given` is a path, or `hf:OWNER/NAME` for a repository of the Hugging Face hub, from which the
    file is fetched with the user's own access. Without it, the folder named by ST_ALIGN_WEIGHTS
    is searched: for a subfolder or a file called like the encoder or its published repository
    (`uni/`, `UNI2-h/`, `uni.bin`), then for a published file name that only this encoder has.
    """
    if given is not None and str(given).startswith(_HUB):
        return _from_hub(entry, str(given).removeprefix(_HUB))
    if given is not None:
        return Path(given).expanduser()
    root = os.environ.get(ENV)
    if not root or not entry.info.files:
        return None
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ModelError(
            f"{ENV} names no folder: {folder}",
            expected="a folder with a subfolder or file per encoder",
        )
    return _search(entry, folder)


def weights_file(path: Path | None, info: EncoderInfo, name: str) -> Path:
    """The weights file at `path`: itself, or the file of a published name in that folder."""
    published = info.expected
    if path is None:
        raise ModelError(
            f"no weights are given for encoder {name!r}",
            expected=f"{published}, from {info.source}",
            fix=f"give the path as weights, or put it into ${ENV}/{name}/",
        )
    if not path.is_dir():
        return path
    for file in info.files:
        if (path / file).is_file():
            return path / file
    there = sorted(child.name for child in path.iterdir())[:5]
    raise ModelError(
        f"{path} holds no weights of encoder {name!r}",
        expected=published,
        found=", ".join(there) or "an empty folder",
    )


def _search(entry: FrozenEntry, folder: Path) -> Path | None:
    names = {entry.name, (entry.info.hub or entry.name).split("/")[-1].casefold()}
    for child in sorted(folder.iterdir()):
        if child.is_dir() and child.name.casefold() in names:
            return child
        if child.suffix in _SUFFIXES and child.stem.casefold() in names:
            return child
    frozen = [e for e in registered().values() if isinstance(e, FrozenEntry)]
    for file in entry.info.files:
        owners = [e.name for e in frozen if file in e.info.files]
        if owners == [entry.name] and (folder / file).is_file():
            return folder / file
    return None


def _from_hub(entry: FrozenEntry, repository: str) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    problem = "none of these files"
    for file in entry.info.files:
        try:
            for other in entry.info.beside:
                hub.hf_hub_download(repository, other)  # into the folder of the weights
            return Path(hub.hf_hub_download(repository, file))
        except LocalEntryNotFoundError as error:  # the hub cannot be reached
            problem = str(error)
        except EntryNotFoundError:
            continue
        except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, OSError) as error:
            problem = str(error)
        break
    raise ModelError(
        f"cannot fetch the weights of {entry.name!r} from the hub repository {repository}",
        expected=entry.info.expected,
        found=problem.strip().splitlines()[0],
        fix=f"{entry.info.source}; sign in with `hf auth login`, or give a local path",
    )
