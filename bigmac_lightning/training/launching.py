"""Starts processes by running the script, or by fork or spawn, as notebooks need.

After fork or spawn it brings the trained weights back into the first process.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.strategies.launchers.multiprocessing import _WorkerOutput
from lightning.pytorch.trainer.states import TrainerFn

from bigmac_lightning.training.finding import LAST


class FindsLast(_Launcher):
    """Lets `ckpt_path="last"` be found by `finding.find` on rank 0, once the ranks can talk to each other. Lightning
    would look for it on each rank before."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        asked = [LAST if isinstance(argument, str) and argument == "last" else argument for argument in args]
        return super().launch(function, *asked, trainer=trainer, **kwargs)  # pyright: ignore[reportAbstractUsage]


class ScriptLauncher(FindsLast, _SubprocessScriptLauncher):
    """Lightning's launcher, which runs the script once more for each process."""


class WholeModelLauncher(FindsLast, _MultiProcessingLauncher):
    """Lightning's launcher, which also loads the weights of all ranks into the module of the process that started them.

    Args:
        whole: collective function that gives the whole model's weights on global rank 0.
    """

    def __init__(
        self,
        strategy: ParallelStrategy,
        start_method: Literal["spawn", "fork", "forkserver"],
        whole: Callable[[], dict[str, Any]],
    ) -> None:
        super().__init__(strategy, start_method)
        self._whole = whole

    def _collect_rank_zero_results(self, trainer: pl.Trainer, results: Any) -> _WorkerOutput | None:
        state = self._whole() if trainer.state.fn == TrainerFn.FITTING else None
        if self._strategy.local_rank != 0:
            return None
        best = getattr(trainer.checkpoint_callback, "best_model_path", None)
        weights = None
        if state is not None:
            weights = Path(tempfile.mkdtemp()) / "weights.ckpt"
            torch.save(state, weights)
        return _WorkerOutput(best, weights, trainer.state, results, self.get_extra_results(trainer))

    def _recover_results_in_main_process(self, worker_output: _WorkerOutput, trainer: pl.Trainer) -> None:
        weights = worker_output.weights_path
        super()._recover_results_in_main_process(worker_output._replace(weights_path=None), trainer)
        if weights is None:
            return
        trainer.lightning_module.configure_model()  # the whole model
        trainer.lightning_module.load_state_dict(torch.load(weights, mmap=True, weights_only=True))
        Path(weights).unlink()
        Path(weights).parent.rmdir()
