"""The config.yaml of a run, and the part of it that an exported folder has.

An exported folder can be moved, so in its config.yaml `HERE` stands for the folder itself.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from bigmac_lightning.checkpoints.fetching import local_folder
from bigmac_lightning.checkpoints.remote import Place

CONFIG = "config.yaml"
"""What `bigmac fit` writes beside the folder of a run's checkpoints, and `bigmac export` into its folder."""
HERE = "<this folder>"
COMPONENTS = "components"
"""The folder in an exported one with the configs of pretrained models that components were built from."""
TRAINING = ("lora", "init_from")
"""Arguments of a model that say where weights came from: in an exported folder adapters are a part of the weights."""
BUILT_FROM = ("config", "path", "weights")
"""Arguments of components that may name the folder of a pretrained model, whose config is read."""


def config_of(checkpoint: Place) -> Place | None:
    """The config of the run that a checkpoint is of, if there is one."""
    above = 3 if isinstance(checkpoint, Path) else 4  # a remote one may be in the folder of a save
    places = (folder / CONFIG for folder in checkpoint.absolute().parents[:above])
    return next((place for place in places if place.is_file()), None)


def write_exported(config: Place, source: str | None, output: Path) -> None:
    """Write what `load` needs of a run's config into an exported folder: its model and its data.

    Of the folders of pretrained models that components were built from, the configs are copied.

    Args:
        config: the run's config. If it names no model, nothing is written.
        source: the folder that training started from, whose place the exported folder takes.
    """
    try:
        given = yaml.safe_load(config.read_bytes().decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{config}, the config of the run, cannot be read: {error}") from error
    if not isinstance(given, dict) or not isinstance(given.get("model"), dict):
        return
    copied = dict[str, str]()

    def moved(key: str, value: str, in_model: bool) -> str:
        if value == source:
            return HERE
        if in_model and key in BUILT_FROM and _is_config(config := Path(local_folder(value)) / "config.json"):
            if value not in copied:
                copied[value] = f"{COMPONENTS}/{len(copied)}"
                (output / copied[value]).mkdir(parents=True)
                shutil.copyfile(config, output / copied[value] / "config.json")
            return f"{HERE}/{copied[value]}"
        return value

    model = given["model"]
    if isinstance(model.get("init_args"), dict):
        model = {**model, "init_args": {k: v for k, v in model["init_args"].items() if k not in TRAINING}}
    kept = {"model": _mapped(model, lambda key, value: moved(key, value, True))}
    if given.get("data"):
        kept["data"] = _mapped(given["data"], lambda key, value: moved(key, value, False))
    (output / CONFIG).write_text(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True), "utf-8")


def read_exported(folder: Path) -> str:
    """The config of an exported folder as a text, with the folder's place in it.

    Raises:
        ValueError: it has none, or it cannot be read.
    """
    try:
        given = yaml.safe_load((folder / CONFIG).read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no {CONFIG} in {folder}, as the run that was exported had none: give load(..., module=..., "
            "data=...)"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {error}") from error

    def placed(key: str, value: str) -> str:
        inside = value == HERE or value.startswith(f"{HERE}/")
        return f"{folder}{value.removeprefix(HERE)}" if inside else value

    return yaml.safe_dump(_mapped(given, placed), sort_keys=False, allow_unicode=True)


def _mapped(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """A config in which each text is changed; `change` gets the text and the key that it stands under."""
    if isinstance(value, dict):
        return {name: _mapped(part, change, str(name)) for name, part in value.items()}
    if isinstance(value, list):
        return [_mapped(part, change, key) for part in value]
    return change(key, value) if isinstance(value, str) else value


def _is_config(path: Path) -> bool:
    """Whether a file is the config of a pretrained model. Others are not copied: a config may come from a stranger."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and bool(found.keys() & {"model_type", "_class_name"})
