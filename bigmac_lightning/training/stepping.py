"""The part of a Lightning strategy that is called in every step: forwards and backwards of Lightning's loop go to
`LightningSteps`, in the contexts that the precision needs."""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from bigmac_lightning.runtime.progress import Progress
from bigmac_lightning.training.lightning_steps import LightningSteps, OnNonfinite
from bigmac_lightning.training.saving import SavingStrategy
from bigmac_lightning.training.watching import Watching


class SteppingStrategy(SavingStrategy):
    """Runs training and evaluation steps.

    Attributes:
        progress: what this process is doing.
    """

    progress: Progress
    _steps: LightningSteps | None = None
    _watching: Watching | None = None
    _on_nonfinite: OnNonfinite = "raise"

    @property
    def steps(self) -> LightningSteps:
        """Runs the batches of Lightning's loop on this rank."""
        assert self._steps is not None, "a step before setup"
        return self._steps

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """A process group of this model replica on the CPU; ``None`` if it has one process."""
        return None

    def enter_loop(self) -> None:
        """A loop of training or evaluation begins."""
        if self._watching is not None:
            self._watching.enter_loop()

    def leave_loop(self) -> None:
        """The last loop has ended."""
        if self._watching is not None:
            self._watching.leave_loop()

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
        """The context of a user's evaluation step. Within a training, signals wait for the next training batch."""
        if self._watching is not None and not self._trains:
            self._watching.before_batch(self.replica_group)
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
