"""The part of a Lightning strategy that is called in every loop and step: forwards and backwards of Lightning's loop go
to `LightningSteps`, in the contexts that the precision needs, and what fails is told to the other ranks."""

import signal
import sys
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.plugins import DoublePrecision, MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from bigmac_lightning.checkpoints.resuming import go_on
from bigmac_lightning.ranks import Ranks
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.runtime.progress import Progress
from bigmac_lightning.training import run_facts
from bigmac_lightning.training.agreement import check_same, digest_of
from bigmac_lightning.training.lightning_steps import LightningSteps, OnNonfinite
from bigmac_lightning.training.memory_report import add_report, has_report, is_out_of_memory
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.saving import SavingStrategy
from bigmac_lightning.training.watching import Watching

STOPPED = 128 + signal.SIGTERM
"""Exit code under torchrun after SIGTERM. After 0, an agent would believe that the run is over, and not start it again
when the agent that was told to end is replaced."""

FLOAT32 = "float32_gradients"
"""Where the state of the fit loop says whether gradients are summed in float32, as a run must not change that."""


class SteppingStrategy(SavingStrategy):
    """Runs training and evaluation steps.

    Attributes:
        progress: what this process is doing.
    """

    _mesh: PipelineMesh | None = None
    _runner: PipelineRunner | None = None
    _steps: LightningSteps | None = None
    _watching: Watching | None = None
    _on_nonfinite: OnNonfinite = "raise"
    _float32_before: bool | None = None  # in the run that is resumed
    _equally_many = False  # whether all pipelines run equally many batches of the evaluation

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.progress, self._ranks = Progress(), Ranks()

    @property
    def steps(self) -> LightningSteps:
        """Runs the batches of Lightning's loop on this rank."""
        assert self._steps is not None, "a step before setup"
        return self._steps

    @property
    def mesh(self) -> PipelineMesh:
        """The (dp, pp, cp, tp) mesh with its process groups."""
        if self._mesh is None:
            raise RuntimeError("the mesh exists only once the processes are set up, inside trainer.fit and the like")
        return self._mesh

    @property
    def device_mesh(self) -> DeviceMesh:
        """The DeviceMesh with dimensions "dp" and "pp", and "cp" and "tp" if a stage has several processes."""
        return self.mesh.mesh

    @property
    def runner(self) -> PipelineRunner:
        """Runs batches on this rank."""
        if self._runner is None:
            raise RuntimeError("the runner exists only after setup, inside trainer.fit and the like")
        return self._runner

    @property
    def replica(self) -> int:
        return 0 if self._mesh is None else self._mesh.dp_rank * self._mesh.cp_size + self._mesh.cp_rank

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """A process group of this model replica on the CPU; ``None`` if it has one process."""
        return self.mesh.host_group

    @property
    def _world_group(self) -> dist.ProcessGroup | None:
        """A process group of all processes on the CPU; ``None`` if there is one process."""
        return None if dist.get_world_size() == 1 else self._ranks.group

    # -- steps ---------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert self.lightning_module is not None
        self.progress.batch = batch_idx
        self.progress.begin("the start of a batch", together=True)
        self.steps.start(self.lightning_module.trainer, batch_idx)

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        self.steps.last_of_step = False
        try:
            yield
        finally:
            self.steps.last_of_step = True

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        self.progress.begin("training_step")
        with self._step_context():
            output = self.lightning_module.training_step(*args, **kwargs)
        self.progress.begin("what follows a batch")
        self.steps.check(output)
        if self._on_nonfinite == "skip":
            self.lightning_module.log("skipped_steps", float(self.steps.skipped), batch_size=1)
        return output

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        with self._evaluation_context("validation"):
            return self.lightning_module.validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        with self._evaluation_context("test"):
            return self.lightning_module.test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        with self._evaluation_context("prediction"):
            return self.lightning_module.predict_step(*args, **kwargs)

    @property
    def _trains(self) -> bool:
        assert self.lightning_module is not None
        return self.lightning_module.trainer.state.fn == TrainerFn.FITTING

    @contextmanager
    def _evaluation_context(self, loop: str) -> Generator[None, None, None]:
        """The context of a user's evaluation step. Signals stop the ranks before it; within a training those of all
        pipelines, which they can do only if all of them run equally many batches."""
        if self._watching is not None and not self._trains:
            self._watching.before_batch(self.replica_group)
        elif self._watching is not None and self._equally_many:
            self._watching.before_batch(self._world_group)
        self.progress.begin(f"a batch of the {loop}")
        with self._step_context():
            yield
        self.progress.begin(f"what follows a batch of the {loop}")

    def _step_context(self) -> AbstractContextManager[None]:
        """The context of a user's step: the default type of new tensors, as in plain training.

        Autocast is not part of it. It must not be on in a backward, so it is entered around each forward only.
        """
        plugin = self.precision_plugin
        return nullcontext() if isinstance(plugin, MixedPrecision) else plugin.forward_context()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self.lightning_module is not None
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        self.progress.begin("the sums of gradients over all ranks", together=True)
        self.steps.restore_gradients()
        self.progress.begin("the optimizer's step")
        return self.precision_plugin.post_backward(closure_loss, self.lightning_module)

    # -- loops and errors ----------------------------------------------------------------------------------------------

    def _enter_loop(self) -> None:
        """A loop of training or evaluation begins."""
        if self._watching is not None:
            self._watching.enter_loop()

    def _leave_loop(self) -> None:
        """The last loop has ended."""
        if self._watching is not None:
            self._watching.leave_loop()

    def on_train_start(self) -> None:
        self._enter_loop()
        super().on_train_start()
        assert self.lightning_module is not None
        check_same(self._ranks, run_facts.progress(self.lightning_module.trainer), "training")
        go_on(self.lightning_module.trainer)
        self.runner.refresh()  # in a resumed run, a callback may have unfrozen parts again

    def on_validation_start(self) -> None:
        self._start_evaluation("num_val_batches")
        super().on_validation_start()

    def on_test_start(self) -> None:
        self._start_evaluation("num_test_batches")
        super().on_test_start()

    def on_predict_start(self) -> None:
        self._start_evaluation("num_predict_batches")
        super().on_predict_start()

    def on_train_end(self) -> None:
        self._leave_loop()
        super().on_train_end()

    def on_validation_end(self) -> None:
        if not self._trains:
            self._leave_loop()
        super().on_validation_end()

    def on_test_end(self) -> None:
        self._leave_loop()
        super().on_test_end()

    def on_predict_end(self) -> None:
        self._leave_loop()
        super().on_predict_end()

    def _start_evaluation(self, batches: str) -> None:
        """Begin a loop of evaluation, of which all ranks of a pipeline must run equally many batches."""
        assert self.lightning_module is not None
        self._enter_loop()
        self.runner.begin_evaluation(self.lightning_module.trainer.fit_loop.total_batch_idx)
        self.runner.sharding.hold()  # here, as replicas may have different numbers of batches
        known = {batches: str(getattr(self.lightning_module.trainer, batches))}
        check_same(self._ranks, {f"pipeline {self.mesh.dp_rank}": known}, "evaluation")
        self._equally_many = self._trains and self._ranks.exchange("", digest_of(known))()[1]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if self._steps is not None and "loops" in checkpoint:
            checkpoint["loops"]["fit_loop"]["state_dict"][FLOAT32] = self._steps.float32_gradients
        with self._watching.patient() if self._watching is not None else nullcontext():
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        if isinstance(self.precision_plugin, DoublePrecision):  # before setup, or float64 would be read into float32
            self.precision_plugin.convert_module(self._module)
        found = super().load_checkpoint(checkpoint_path, weights_only)
        self._float32_before = found.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get(FLOAT32)
        return found

    def tell_others(self) -> None:
        error = sys.exception()
        if error is not None:
            self._failed(error)

    def on_exception(self, exception: BaseException) -> None:
        self._failed(exception)
        if isinstance(exception, SIGTERMException) and isinstance(self.cluster_environment, TorchElasticEnvironment):
            exception.code = STOPPED
        super().on_exception(exception)

    def _failed(self, error: BaseException) -> None:
        if is_out_of_memory(error) and not has_report(error):
            add_report(error, self.lightning_module, self.optimizers, self.root_device, self.progress.doing)
        if self._watching is not None:
            self._watching.failed(error)
