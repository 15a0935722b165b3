"""Folders of pretrained models, which strangers may have written: which of their files weights are read from.

The libraries prefer safetensors. Pickles (``.bin``, ``.pt``) are read only if they hold nothing but tensors.
"""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from bigmac_lightning.checkpoints.fetching import local_folder
from bigmac_lightning.checkpoints.remote import RemotePath, at
from bigmac_lightning.checkpoints.safe import named_in

ADAPTER = "adapter_config.json"


@contextmanager
def reading_weights(source: str, model: str) -> Iterator[str]:
    """Checks a folder before the block, in which a library reads the weights, and turns the library's errors into clear
    ones.

    Args:
        source: the folder, which may be remote.
        model: what errors call the model.

    Yields: the folder, or the copy of a remote one.

    Raises:
        ValueError: there is no such folder, its weights cannot be read, or they would be read from somewhere else.
    """
    folder = Path(local_folder(source, weights=True))
    if not folder.is_dir():
        raise ValueError(f"there is no checkpoint folder at {source}")
    if (folder / ADAPTER).exists():
        raise ValueError(
            f"{source} has adapters beside its weights ({ADAPTER}), which would change the model: merge them into the "
            f"weights with peft, or remove {ADAPTER}"
        )
    for index in sorted(folder.glob("*.index.json")):
        _check_index(index)
    try:
        yield str(folder)
    except pickle.UnpicklingError as error:
        raise ValueError(f"cannot load {source} as a {model}: it holds {named_in(error)}. {UNSAFE}") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        hint = "" if has_safetensors(str(folder)) else f" {UNSAFE}"
        raise ValueError(f"cannot load {source} as a {model}: {error}{hint}") from error


def check_weights(source: str) -> None:
    """Look for the files of weights, and at their headers, so that what is missing is known early. Remote folders are
    left out.

    Raises:
        ValueError: there is no such folder, it has no weights, or a file of them is not there or not whole.
    """
    if isinstance(at(source), RemotePath):
        return
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"there is no checkpoint folder at {source}")
    indices = sorted(folder.glob("*.safetensors.index.json"))
    names = {name for index in indices for name in _check_index(index)}
    names = names or {name for name in NAMES if (folder / name).exists()}
    if not names and not any((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        raise ValueError(f"{source} has no weights: there is no {' or '.join(NAMES)} in it")
    if missing := sorted(name for name in names if not (folder / name).exists()):
        raise ValueError(
            f"{source} has not all of its weights: {indices[0].name} names {missing[0]}, which is not there"
        )
    for name in sorted(names):
        _check_whole(folder / name)


def _check_whole(file: Path) -> None:
    """
    Raises:
        ValueError: a file of safetensors is shorter or longer than its header says, or has none.
    """
    try:
        with safe_open(file, "pt"):  # the header alone is read
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is not whole or no file of weights ({error}): copy it again") from error


NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
"""Of files that have all weights of a model."""
UNSAFE = (
    "It has no safetensors. Other files of weights are pickles, which could run code, so they are read only if they "
    "hold nothing but tensors: save the model as safetensors"
)


def _check_index(index: Path) -> set[str]:
    """
    Returns: the names of the files of weights.

    Raises:
        ValueError: it is damaged, or names files outside of its folder.
    """
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        outside = sorted(name for name in names if Path(name).name != name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged: {type(error).__name__}: {error}") from error
    if outside:
        raise ValueError(f"{index} names the file {outside[0]!r}, which is not in its folder")
    return names


def has_safetensors(source: str) -> bool:
    """Whether a folder has weights as safetensors, or no other weights."""
    return any(Path(source).glob("*.safetensors")) or not any(Path(source).glob("*.bin"))
