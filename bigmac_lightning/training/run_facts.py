"""What all ranks of a run must have alike, as texts by key: versions, settings, the model, optimizers.

Initial weights are not among them, because rank 0's are sent to all, and neither are the weights' values later on.
"""

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.training.agreement import digest

PACKAGES = ("bigmac-lightning", "torch", "lightning", "transformers", "diffusers", "peft", "numpy")

TRAINER = (
    "max_steps",
    "max_epochs",
    "min_steps",
    "min_epochs",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "val_check_interval",
    "check_val_every_n_epoch",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "num_sanity_val_steps",
    "overfit_batches",
    "log_every_n_steps",
)
"""Settings of a Trainer that decide when ranks do something together."""

SAVING = ("monitor", "mode", "save_top_k", "save_last", "save_on_exception", "_every_n_train_steps", "_every_n_epochs")
"""Settings of a ModelCheckpoint that decide when it saves."""

LLM = ("num_layers", "width", "vocabulary", "tied", "placeholders", "gradient_checkpointing", "auxiliary_losses")

ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def settings(
    trainer: pl.Trainer, module: pl.LightningModule, precision: Precision, strategy: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """What is known before the processes do anything together.

    Args:
        strategy: the strategy's arguments by name; those of dataclasses are told apart.
    """
    return {
        "versions": versions(),
        "strategy": dict(_flat("", dict(strategy))),
        "trainer": _trainer(trainer) | {"precision": f"{precision.precision} ({type(precision).__name__})"},
        "model": model(module),
    }


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what is computed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, str]]:
    """The fields of dataclasses and dicts by their path. A file counts by what is in it."""
    if is_dataclass(value):
        value = {entry.name: getattr(value, entry.name) for entry in fields(value)}
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _flat(".".join(filter(None, (prefix, str(name)))), part)
    else:
        yield prefix, _text(value)
        if isinstance(value, str | Path) and str(value).endswith((".csv", ".json")) and Path(value).is_file():
            yield f"{prefix} (contents)", f"{digest([Path(value).read_bytes()]):x}"


def _text(value: Any) -> str:
    return ADDRESS.sub("", repr(value))


def _trainer(trainer: pl.Trainer) -> dict[str, str]:
    found = {name: _text(getattr(trainer, name)) for name in TRAINER}
    found["running"] = str(trainer.state.fn)
    found["detect_anomaly"] = _text(trainer._detect_anomaly)
    found["seed_everything"] = os.environ.get("PL_GLOBAL_SEED", "not called")
    callbacks: Any = trainer.checkpoint_callbacks
    for i, callback in enumerate(callbacks):
        chosen = {name.lstrip("_"): getattr(callback, name, None) for name in SAVING}
        found[f"checkpoint callback {i}"] = f"{type(callback).__name__} {chosen}"
    return found


def model(module: pl.LightningModule) -> dict[str, str]:
    """The classes of components, and their configs."""
    found = {"class": type(module).__qualname__}
    if not isinstance(module, PipelineModule):
        return found
    llm: Any = module.llm
    found |= {"llm": type(llm).__qualname__, "loss_weights": _text(module.loss_weights)}
    found |= {f"llm.{name}": _text(getattr(llm, name)) for name in LLM}
    for kind in ("encoders", "generators"):
        components: nn.ModuleDict = getattr(module, kind)
        found[kind] = ", ".join(f"{name}: {type(part).__qualname__}" for name, part in components.items()) or "none"
    for name, part in [("llm", llm), *module.encoders.items(), *module.generators.items()]:
        found |= _config(name, getattr(part, "config", None))
        found[f"{name}.gradient_checkpointing"] = _text(getattr(part, "gradient_checkpointing", False))
    return found


def _config(name: str, config: Any) -> dict[str, str]:
    """The entries of a component's config of transformers or diffusers."""
    known = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(known, Mapping):
        return {}
    texts = ((key, json.dumps(value, default=str, sort_keys=True)) for key, value in known.items())
    return {f"{name}.config.{key}": text for key, text in texts if not key.startswith("_")}


def weights(module: PipelineModule, llm: str) -> dict[str, dict[str, str]]:
    """Names, shapes and types of weights and buffers, and the layers of components that every rank has whole. A section
    is shared by the ranks that have the same part of the model.

    Args:
        llm: names the part of the LLM that this rank has.
    """
    found: dict[str, dict[str, str]] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        trained = ", trained" if tensor.requires_grad else ""
        found.setdefault(part_of(name, llm), {})[name] = f"{tuple(tensor.shape)} {tensor.dtype}{trained}"
    for kind in ("encoders", "generators"):
        components: nn.ModuleDict = getattr(module, kind)
        for name, component in components.items():
            found.setdefault(f"{kind}.{name}", {})["layers"] = _text(component)
    return found


def llm_part(mesh: PipelineMesh) -> str:
    """Names the part of the LLM that this rank has."""
    peer = f", tensor peer {mesh.tp_rank}" if mesh.tp_size > 1 else ""
    return f"llm of pipeline rank {mesh.pp_rank}{peer}"


def part_of(name: str, llm: str) -> str:
    """The section of a parameter: its component, or this rank's part of the LLM."""
    kind, _, rest = name.partition(".")
    return llm if kind == "llm" else f"{kind}.{rest.partition('.')[0]}"


def optimizers(
    module: PipelineModule, found: Iterable[Optimizer], schedulers: Iterable[LRSchedulerConfig], llm: str
) -> dict[str, dict[str, str]]:
    """The settings of optimizers and learning rate schedulers; and, of weights that several ranks have, the settings of
    their groups. Stages may have other settings than other stages.

    Args:
        llm: as for `weights`.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    sections: dict[str, dict[str, str]] = {"optimizer": {}}
    for i, optimizer in enumerate(found):
        of = f"optimizer {i}"
        sections["optimizer"][of] = type(optimizer).__qualname__
        sections["optimizer"] |= {f"{of} {key}": _text(_plain(v)) for key, v in optimizer.defaults.items()}
        for group in optimizer.param_groups:
            chosen = {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
            for parameter in group["params"]:
                name = names.get(id(parameter), "")
                if name:
                    sections.setdefault(part_of(name, llm), {})[f"{of} of {name}"] = _text(chosen)
    for i, config in enumerate(schedulers):
        state = {k: v for k, v in config.scheduler.state_dict().items() if isinstance(v, int | float | str)}
        text = f"{type(config.scheduler).__qualname__} every {config.frequency} {config.interval} {state}"
        sections["optimizer"][f"scheduler {i}"] = text
    return sections


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def progress(trainer: pl.Trainer) -> dict[str, dict[str, str]]:
    """Where training begins, and how many batches an epoch has."""
    return {
        "training": {
            "global_step": str(trainer.global_step),
            "epoch": str(trainer.current_epoch),
            "training batches of an epoch": str(trainer.num_training_batches),
            "validation": "runs" if trainer.enable_validation else "none",
        }
    }
