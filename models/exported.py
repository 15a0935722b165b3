"""Folders that `bigmac export` has written, as weights to start from.

Components of the Hugging Face model read the folder themselves, each process its part. Here it is checked whether all
tensors have a place, and the file beside the model is read.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from bigmac_lightning.checkpoints.fetching import local_folder
from bigmac_lightning.checkpoints.mismatches import Shape, mismatches
from bigmac_lightning.checkpoints.remote import Place, at
from bigmac_lightning.checkpoints.weights import copy_into

from .export import OTHERS, in_whole
from .folders import ADAPTER, reading_weights
from .hf_component import HFComponent


def is_exported(path: str | Place) -> bool:
    """Whether a Hugging Face folder is at a path, and no checkpoint of training.

    Raises:
        ValueError: it has adapters alone.
    """
    folder = at(path)
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"{path} has adapters ({ADAPTER}), and not the weights that they change: load it with peft beside the "
            "model that training started from, or export the run without --adapters"
        )
    return (folder / "config.json").is_file()


class ExportedFolder:
    """The weights in an exported folder.

    Attributes:
        given: the folder, which may be remote.
        path: the folder, or the copy of a remote one.
        others: the shapes of tensors that are no part of the Hugging Face model, by their names in the module.
    """

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            ValueError: the file of other components is damaged, or a remote folder cannot be read.
        """
        self.given, self.path = str(path), Path(local_folder(path, weights=True))
        with reading_weights(str(path), "MultimodalLM"):
            self.others = _shapes([self.path / OTHERS]) if (self.path / OTHERS).exists() else {}

    def start(self, components: Mapping[str, nn.Module], expected: Mapping[str, Shape], whole: bool) -> list[str]:
        """Let components that have no weights yet read their part of the Hugging Face model from here.

        Args:
            components: the components that are to start, by name.
            expected: the shapes of all of their tensors, by name in the module.
            whole: whether these are all components, so that every tensor here must have a place.

        Returns: why they cannot, by the names of tensors; then nothing has changed.

        Raises:
            ValueError: the folder cannot be read.
        """
        found, unread = list[str](), set[str]()
        left = {name: shape for name, shape in expected.items() if name not in self.others}
        readers = list[HFComponent]()
        for component, part in components.items():
            if not isinstance(part, HFComponent):
                continue
            model = part.build_whole()
            known = model.state_dict().keys() - model.all_tied_weights_keys.keys()
            own = {name for name in left if name.startswith(f"{component}.") and in_whole(name) in known}
            if own:
                found += self._mismatches(model, known)
                unread = (unread if readers else known) - {in_whole(name) for name in own}
                left = {name: shape for name, shape in left.items() if name not in own}
                readers.append(part)
        left |= {name: shape for name, shape in expected.items() if name in self.others}
        here = {
            n: shape for n, shape in self.others.items() if whole or n.startswith(tuple(f"{c}." for c in components))
        }
        found += mismatches(here, left)
        found += [f"{name}: not in the model" for name in sorted(unread) if whole]
        if not found:
            for part in readers:
                part.source = self.given
        return list(dict.fromkeys(found))  # LLM and encoder find the same

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values of other components into these tensors, by name; see `CheckpointWeights.read_into`."""
        if tensors:
            with safe_open(self.path / OTHERS, "pt") as file:
                for name, tensor in tensors.items():
                    copy_into(file.get_tensor(name), tensor)

    def _mismatches(self, model: PreTrainedModel, names: Collection[str]) -> list[str]:
        """How the folder's Hugging Face model differs from one on the meta device, by the names that files have."""
        state = {name: tensor for name, tensor in model.state_dict().items() if name in names}
        expected = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}
        with reading_weights(str(self.path), type(model).__name__):
            index = self.path / SAFE_WEIGHTS_INDEX_NAME
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values()) if index.exists() else ()
            return mismatches(_shapes([self.path / name for name in names or [SAFE_WEIGHTS_NAME]]), expected)


def _shapes(files: Iterable[Path]) -> dict[str, Shape]:
    """The shapes of the tensors in files, by name."""
    shapes = dict[str, Shape]()
    for path in files:
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes
