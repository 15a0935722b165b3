"""The part of a Lightning strategy that saves and loads checkpoints where every rank has a part of the module.

Hooks of modules and callbacks see this rank's part of `checkpoint["state_dict"]`, both when it is saved and when it is
loaded, and may change it as in one process. Files and formats are in checkpoint.py.
"""

import logging
import zipfile
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # pyright: ignore[reportPrivateImportUsage]
from torch.optim import Optimizer

from bigmac_lightning.checkpoints import files, marker, saves
from bigmac_lightning.checkpoints.agreement import agree, on_first_rank, place_of, together
from bigmac_lightning.checkpoints.optimizer_state import bare, named_state, numbered_state
from bigmac_lightning.checkpoints.parts import Names
from bigmac_lightning.checkpoints.reading import NOT_WHOLE, DirectoryCheckpointIO, as_checkpoint
from bigmac_lightning.checkpoints.remote import Place, RemotePath, at
from bigmac_lightning.checkpoints.resuming import stand_at_last_step
from bigmac_lightning.checkpoints.safe import load_file, trusting
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.groups import destroy_with
from bigmac_lightning.runtime.sharding import shard_like
from bigmac_lightning.training import checkpoint as checkpoints
from bigmac_lightning.training import holding
from bigmac_lightning.training.background import Background
from bigmac_lightning.training.copying import Copies
from bigmac_lightning.training.finding import AUTO, LAST, NoCheckpoint, find, folders_of_checkpoints
from bigmac_lightning.training.processes import ProcessStrategy
from bigmac_lightning.training.repeating import Repeating
from bigmac_lightning.training.writing import Contents, check_writable, discard, gathered, save_directory, save_file

log = logging.getLogger(__name__)

PATIENCE = timedelta(minutes=1)
"""A rank that an error has stopped waits this long for all others to stop as well, and else saves nothing: long enough
for a step to end, and short beside the time that a lost run costs."""

LIGHTNINGS_OWN = (TorchCheckpointIO, DirectoryCheckpointIO)
"""The checkpoint plugins that a Trainer has if the user gives none."""


class SavingStrategy(ProcessStrategy):
    """Reads and writes checkpoints, directories or single files, that any number of ranks can read."""

    def __init__(
        self,
        *,
        save_distributed_checkpoint: bool = True,
        async_save: bool = False,
        checkpoint_weights_only: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._save_distributed_checkpoint = save_distributed_checkpoint
        self._async_save = async_save
        self._background, self._repeating, self._copies = Background(), Repeating(), Copies()
        self._names: Names | None = None  # of the running training's module
        self._saving_group: Any = None  # of saves in the background alone, as they run beside the groups of training
        self._checkpoint_weights_only = checkpoint_weights_only
        self._loaded_from = ""
        self._running = False
        self._meeting: Any = None
        self._behind = False  # the last save was, or is being, written in the background
        self._left = False  # after an error on this rank alone: the others will not join a collective any more

    @property
    def replica(self) -> int:
        """The data-parallel replica that this process belongs to."""
        return 0

    @property
    def _module(self) -> PipelineModule:
        assert isinstance(self.lightning_module, PipelineModule)
        return self.lightning_module

    def open_module(self) -> None:
        """Allow what `holding.close` forbids, for a run. Collective."""
        self._running, self._names = True, None
        if self._meeting is None and dist.is_initialized():
            self._meeting = dist.new_group(backend="gloo", timeout=min(PATIENCE, self._timeout or PATIENCE))
            destroy_with(self, [self._meeting])
        if self._async_save and self._saving_group is None and dist.is_initialized():
            self._saving_group = dist.new_group(backend="gloo", timeout=self._timeout)
            destroy_with(self, [self._saving_group])
        holding.open_again(self._module)

    def close_module(self) -> None:
        """Once a run is over, the module refuses what needs the whole model."""
        self._running, self._copies = False, Copies()
        holding.close(self._module)

    def check_remote_folders(self, trainer: pl.Trainer) -> None:
        """Find out, before training, whether checkpoints can be written where callbacks will save them. Collective.

        Raises:
            ValueError, OSError, RuntimeError: they cannot; the message names the place. Raised on all ranks.
        """
        for folder in folders_of_checkpoints(trainer) if trainer.state.fn == TrainerFn.FITTING else ():
            if isinstance(folder, RemotePath):
                check_writable(folder)

    def check_checkpoint_plugins(self, trainer: pl.Trainer) -> None:
        """Refuse, before training, plugins with which no checkpoint directory can be written.

        Raises:
            ValueError: there is one; the message names it.
        """
        if self._save_distributed_checkpoint and type(self.checkpoint_io) not in LIGHTNINGS_OWN:
            raise ValueError(
                f"{type(self.checkpoint_io).__name__} writes files, but strategy='bigmac' writes directories: give "
                "BigMacStrategy(save_distributed_checkpoint=False), or leave the plugin out"
            )

    # -- saving --------------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights of this rank's part."""
        holding.open_again(self._module)  # a checkpoint may also be saved after a run
        return self._module.state_dict()

    def tell_others(self) -> None:
        """Tell the other ranks of the error that has stopped this one, before it waits for them."""

    def whole_state_dict(self) -> dict[str, Any]:
        """The whole model's weights, on global rank 0. Collective."""
        part = {"state_dict": self.lightning_module_state_dict()}
        return gathered(Contents.of(part, checkpoints.names_of(self._module), self.replica, whole=True))["state_dict"]

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer state of this rank's part, keyed by parameter names."""
        return named_state(self._module, self._module.tied_copies, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint of all ranks. Collective.

        After an error this writes nothing, unless all ranks come here after the same step.
        """
        trainer = self._module._trainer
        if trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED:
            self.tell_others()
            if not self._all_stop_here(trainer):
                log.error("no checkpoint was saved at %s: other ranks are not where this one was stopped", filepath)
                self._left = True
                return
        stand_at_last_step(checkpoint, trainer)
        self._save(checkpoint, filepath, storage_options)
        if not self._running:
            holding.close(self._module)

    def _save(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any) -> None:
        self._background.wait()
        trainer = self._module._trainer
        training = self._running and trainer is not None and trainer.state.status == TrainerStatus.RUNNING
        self._behind = behind = self._async_save and training
        if self._names is None or not self._running:
            self._names = checkpoints.names_of(self._module)
        names, path = self._names, str(filepath)
        place = at(path)
        if self._save_distributed_checkpoint and storage_options is not None:
            raise TypeError(f"storage_options={storage_options!r} are for plugins that write single files")
        contents = Contents.of(checkpoint, names, self.replica, whole=not self._save_distributed_checkpoint)

        def write(contents: Contents, group: Any = None) -> None:
            if self._save_distributed_checkpoint:
                save_directory(contents, place, group, self._repeating)
            else:
                save_file(contents, path, lambda whole: self._write_file(whole, path, storage_options), group)

        if behind:
            if self.is_global_zero and isinstance(place, Path):
                with suppress(OSError):  # a link to it may be made before it is there; the save itself raises the error
                    place.parent.mkdir(parents=True, exist_ok=True)
            self._background.start(partial(write, contents.copied(self._copies), self._saving_group))
        else:
            write(contents)

    def on_train_end(self) -> None:
        """Wait for the last save."""
        super().on_train_end()
        self._background.wait()

    def on_exception(self, exception: BaseException) -> None:
        """Wait for the last save: what all ranks have given to it is still written."""
        try:
            self._background.wait()
        except Exception as error:
            log.error("%s", error)
        super().on_exception(exception)

    def teardown(self) -> None:
        super().teardown()
        self._background.wait()

    def _all_stop_here(self, trainer: pl.Trainer) -> bool:
        """Whether every rank was stopped after the same step. Collective if every rank was; else it times out."""
        if self._left or self._meeting is None or any(parameter.is_meta for parameter in self._module.parameters()):
            return False
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        place = (trainer.global_step, progress.ready, progress.processed)
        places: list[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(places, place, group=self._meeting)
        except RuntimeError:
            return False
        return len(set(places)) == 1

    def barrier(self, name: str | None = None) -> None:
        nothing_written = name == "Trainer.save_checkpoint" and self._behind  # so there is nothing to wait for
        if not self._left and not nothing_written:
            super().barrier(name)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision if self._left else super().reduce_boolean_decision(decision, all)

    def _write_file(self, checkpoint: dict[str, Any], path: str, storage_options: Any) -> None:
        if type(self.checkpoint_io) not in LIGHTNINGS_OWN or not _is_local_file_protocol(path):
            if _is_local_file_protocol(path) and Path(path).is_dir():
                files.remove(Path(path))
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
            if isinstance(place := at(path), RemotePath):
                saves.remove_directory(place)  # which would be found first
            return
        place = files.unfinished(Path(path))
        try:
            self.checkpoint_io.save_checkpoint(checkpoint, str(place), storage_options)
            files.put(place, Path(path))
        except Exception:
            discard(place)
            raise

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Delete a checkpoint, but not before the one that is being written is whole."""
        if self.is_global_zero:
            self._background.after(partial(self._remove, str(filepath)))

    def _remove(self, path: str) -> None:
        try:
            if _is_local_file_protocol(path) or type(self.checkpoint_io) in LIGHTNINGS_OWN:
                files.remove(at(path))
            else:
                self.checkpoint_io.remove_checkpoint(path)
        except Exception as error:  # of any library; training need not end for that
            rank_zero_warn(f"cannot remove the checkpoint {path}: {error}")

    # -- loading -------------------------------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """This rank's part of a checkpoint of any strategy. Collective.

        Weights are read directly into the module's tensors, unless a hook has to see them first.
        """
        module = self._module
        self._background.wait()
        if checkpoint_path in (AUTO, LAST):
            found = find(module.trainer, str(checkpoint_path))
            module.trainer._checkpoint_connector._ckpt_path = found  # by which Lightning knows what not to delete
            if found is None:
                return NoCheckpoint()
            checkpoint_path = found
        weights_only = not trusting(self._checkpoint_weights_only if weights_only is None else weights_only)
        names, path = checkpoints.names_of(module), self.broadcast(str(checkpoint_path))
        self._loaded_from = path
        hooked, fitting = _has_hooks(module), module.trainer.state.fn == TrainerFn.FITTING

        def look() -> tuple[Place, bool, bool]:
            place = files.present(at(path))
            return place, (directory := place.is_dir()), directory and not (place / marker.MARKER).exists()

        what = "" if _is_local_file_protocol(path) else f"cannot read the checkpoint {path}"
        place, is_directory, unmarked = on_first_rank(look, what)
        if is_directory:
            own = {} if hooked else module.state_dict()
            part = checkpoints.load_directory(place, names, own, fitting, hooked, weights_only)
            if unmarked:
                rank_zero_warn(
                    f"{place} has no {marker.MARKER}, as it was saved by an earlier version: damaged bytes in its "
                    "files cannot be found, only missing and short files"
                )
            return part
        path = str(place)
        agree(together(lambda: marker.problems(place, share=place_of()), what), NOT_WHOLE.format(place))
        return names.select(as_checkpoint(self._read_file(path, weights_only), path))

    def _read_file(self, path: str, weights_only: bool) -> dict[str, Any]:
        if type(self.checkpoint_io) in LIGHTNINGS_OWN and _is_local_file_protocol(path):
            mapped = zipfile.is_zipfile(path)  # so that only the used parts are read
            return together(lambda: load_file(path, path, weights_only, mmap=mapped), "")
        return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Load this rank's part of the weights. Collective."""
        module = self._module
        names = checkpoints.names_of(module)
        checkpoints.load_weights(module, checkpoint["state_dict"], names, strict, self._loaded_from)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Load this rank's part of the optimizers' states. Collective.

        Raises:
            ValueError: the states are not those of these optimizers; raised on all ranks.
        """
        states: list[dict[str, Any]] = checkpoint["optimizer_states"]
        problems: list[str] = []
        if len(states) != len(self.optimizers):
            problems.append(f"it has {len(states)} of them, but there are {len(self.optimizers)} optimizers")
        numbered: list[dict[str, Any]] = []
        for optimizer, state in zip(self.optimizers, states, strict=False):
            try:
                if "groups" not in state:
                    raise ValueError(
                        "another strategy has saved them, and strategy='bigmac' cannot continue from them: start from "
                        "the weights alone (MultimodalLM(init_from=...), or a checkpoint with save_weights_only)"
                    )
                numbered.append(numbered_state(self._module, self._module.tied_copies, optimizer, state))
            except ValueError as error:
                problems.append(str(error))
        agree(problems, f"cannot load the optimizer states of {self._loaded_from}")
        for optimizer, state in zip(self.optimizers, numbered, strict=True):
            parameters = [p for group in bare(optimizer).param_groups for p in group["params"]]
            for number, entries in state["state"].items():
                state["state"][number] = {key: shard_like(value, parameters[number]) for key, value in entries.items()}
            bare(optimizer).load_state_dict(state)


def _has_hooks(module: PipelineModule) -> bool:
    """Whether the module or a callback has a hook that sees checkpoints before they are loaded."""
    callbacks: list[pl.Callback] = module.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    hooks = [(module, PipelineModule), *((callback, pl.Callback) for callback in callbacks)]
    return any(type(one).on_load_checkpoint is not base.on_load_checkpoint for one, base in hooks)
