"""Hooks that read, change, add and remove what is in checkpoints, on several ranks as in one process."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

STEPS = 2


class _Frozen(ToyModule):
    """Saves what is trained alone."""

    def __init__(self) -> None:
        super().__init__(tied=True, freeze=("encoders.image", "llm.layers.1", "llm.layers.3"))
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name in trained}


class _TrainedAlone(_Frozen):
    """The same by the module's own state_dict."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super(_Frozen, self).on_save_checkpoint(checkpoint)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in super().state_dict(*args, **kwargs).items() if name in trained}


class _Renames(ToyModule):
    def __init__(self) -> None:
        super().__init__(tied=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.replace("llm.", "decoder."): tensor for name, tensor in state.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.replace("decoder.", "llm."): tensor for name, tensor in state.items()}


class _Average(pl.Callback):
    """A moving average, in the `state_dict` and, by names and by their list, beside it."""

    def __init__(self) -> None:
        self.average: dict[str, torch.Tensor] = {}
        self.names: list[str] | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            before = self.average.setdefault(name, parameter.detach().clone())
            self.average[name] = 0.5 * before + 0.5 * parameter.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"average": dict(self.average), "names": list(self.average), "note": "of an average"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict["average"].keys() == set(state_dict["names"])
        self.names = state_dict["names"]
        assert state_dict["note"] == "of an average"
        self.average = state_dict["average"]

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"].update({f"ema.{name}": tensor for name, tensor in self.average.items()})

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        found = {
            name.removeprefix("ema."): t for name, t in checkpoint["state_dict"].items() if name.startswith("ema.")
        }
        assert found.keys() == dict(pl_module.named_parameters()).keys()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.names in (None, list(dict(pl_module.named_parameters())))


class _Averaged(ToyModule):
    def __init__(self) -> None:
        super().__init__(tied=True)
        self.strict_loading = False


MODULES = {"frozen": _Frozen, "trained-alone": _TrainedAlone, "renames": _Renames, "average": _Averaged}
Result = tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]


def _fit(make_trainer: Any, folder: Path, name: str, epochs: int, resume: bool) -> Result:
    average = _Average()
    callbacks = [average] if name == "average" else []
    trainer = make_trainer(max_epochs=epochs, callbacks=callbacks, limit_val_batches=0)
    module = MODULES[name]()
    trainer.fit(module, ToyData(steps=STEPS), ckpt_path=folder / f"{name}.ckpt" if resume else None)
    if not resume:
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    return module.losses, weights(module), average.average


def _fit_all(rank: int, world: int, folder: Path, distributed: bool, epochs: int, resume: bool) -> dict[str, Result]:
    def make_trainer(**options: Any) -> pl.Trainer:
        return pipeline_trainer(world, {"save_distributed_checkpoint": distributed}, **options)

    return {name: _fit(make_trainer, folder, name, epochs, resume) for name in MODULES}


@pytest.mark.parametrize(
    "distributed", [pytest.param(True, id="directory"), pytest.param(False, id="file", marks=pytest.mark.wide)]
)
def test_hooks(distributed: bool, tmp_path: Path) -> None:
    whole = on_ranks(2, _fit_all, 2, tmp_path, distributed, 2, False)
    on_ranks(2, _fit_all, 2, tmp_path, distributed, 1, False)
    again = on_ranks(2, _fit_all, 2, tmp_path, distributed, 2, True)
    others = on_ranks(3, _fit_all, 3, tmp_path, distributed, 2, True)
    for name in MODULES:
        for before, after in zip(whole, again, strict=True):
            assert after[name][0] == before[name][0][STEPS:], name
            for kind in (1, 2):
                assert after[name][kind].keys() == before[name][kind].keys()
                if before[name][kind]:
                    assert_close(after[name][kind], before[name][kind], 0.0)
        for kind in (1, 2):
            every = {key: weight for rank in whole for key, weight in rank[name][kind].items()}
            for rank in others:
                assert rank[name][0] == pytest.approx(whole[0][name][0][STEPS:], rel=1e-5)
                if every:
                    assert_close(rank[name][kind], every, 1e-5)
    if not distributed:
        kept = torch.load(tmp_path / "frozen.ckpt", weights_only=True)["state_dict"]
        assert kept.keys() == torch.load(tmp_path / "trained-alone.ckpt", weights_only=True)["state_dict"].keys()
        assert "llm.layers.0.mix.weight" in kept
        assert not [key for key in kept if key.startswith(("encoders.image", "llm.layers.1.", "llm.layers.3."))]
        assert "decoder.layers.3.mix.weight" in torch.load(tmp_path / "renames.ckpt", weights_only=True)["state_dict"]


def _rename_old(rank: int, path: Path) -> dict[str, torch.Tensor]:
    module = _Renames()
    pipeline_trainer(3).validate(module, ToyData(), ckpt_path=path, verbose=False)
    return weights(module)


def test_an_old_checkpoint_with_other_names(tmp_path: Path) -> None:
    """Of one process; each rank finds its own among names that the model does not have."""
    module = _Renames()
    trainer = plain_trainer(max_epochs=1, limit_val_batches=0)
    trainer.fit(module, ToyData(steps=STEPS))
    trainer.save_checkpoint(tmp_path / "old.ckpt", weights_only=True)
    for found in on_ranks(3, _rename_old, tmp_path / "old.ckpt"):
        assert_close(found, weights(module), 0.0)


class _Unnamed(pl.Callback):
    """Keeps tensors without names, other ones on each rank."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["shadow"] = [parameter.detach() for parameter in pl_module.llm.parameters()]


def _save_unnamed(rank: int, folder: Path, distributed: bool) -> str:
    trainer = pipeline_trainer(
        2, {"save_distributed_checkpoint": distributed}, max_epochs=1, limit_val_batches=0, callbacks=[_Unnamed()]
    )
    trainer.fit(ToyModule(tied=True), ToyData(steps=1))
    try:
        trainer.save_checkpoint(folder / "unnamed.ckpt")
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("distributed", [True, False], ids=["directory", "file"])
def test_tensors_without_names_are_refused(distributed: bool, tmp_path: Path) -> None:
    for error in on_ranks(2, _save_unnamed, tmp_path, distributed):
        assert "checkpoint['shadow'] has other tensors on each rank" in error
        assert "by the parameter's name" in error
    assert not (tmp_path / "unnamed.ckpt").exists()
