"""The batches of Lightning's training loop through the pipeline.

Lightning zeroes gradients between `training_step` and `backward`, but a pipeline runs its backward inside
`training_step`. So gradients are set aside there and given back in `backward`: zeroing, accumulation, clipping,
precision plugins, schedulers and hooks then behave as in plain training.
Knows Lightning's loop and a runner; knows nothing of plans or processes.
"""

import logging
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.contracts.outputs import Mode, PipelineOutput
from bigmac_lightning.runtime import hooks
from bigmac_lightning.runtime.buffers import ReplicatedBuffers
from bigmac_lightning.runtime.gradients import accumulate_in, reduce_gradients, round_gradients
from bigmac_lightning.schedule.simulate import simulate
from bigmac_lightning.training.runner import PipelineRunner

log = logging.getLogger(__name__)

MANY_BUBBLES = 1 / 3
"""The share of idle time above which the user is told."""

MANY_MICROBATCHES = 8
"""Sums of more gradients than these are taken in float32 by default."""


class LightningSteps:
    """Runs the batches of a fitted or evaluated module. Calling it is what `PipelineModule.pipeline` does.

    Args:
        float32_gradients: whether gradients of weights in half precision are summed up in float32; ``None``: if there
            are more than `MANY_MICROBATCHES` of them in an optimizer step.
    """

    def __init__(
        self, module: PipelineModule, runner: PipelineRunner, precision: Precision, float32_gradients: bool | None
    ) -> None:
        self._module, self._runner, self._precision = module, runner, precision
        self._float32_gradients = float32_gradients
        self._loss: Tensor | None = None
        self._stash: list[tuple[nn.Parameter, Tensor | None]] | None = None
        self._first_of_step = True
        self._batches = 1  # of an optimizer step
        self._warned = dist.get_rank() > 0
        mesh = runner.mesh
        self._buffers = [ReplicatedBuffers([module.encoders, module.generators], None)] * (dist.get_world_size() > 1)
        self._buffers += [ReplicatedBuffers([module.llm], mesh.dp_group)] * (mesh.dp_size > 1)

    def gradient_norm(self) -> Tensor:
        """See `PipelineModule.gradient_norm`."""
        return self._runner.gradient_norm()

    def start(self, trainer: pl.Trainer, batch_idx: int) -> None:
        """Before a training batch. Collective over the pipeline."""
        self._batches = trainer.accumulate_grad_batches
        self._first_of_step = batch_idx % self._batches == 0
        self._runner.step = trainer.fit_loop.total_batch_idx
        self._runner.refresh()  # a callback may have frozen or unfrozen something
        self._loss = self._stash = None

    def __call__(self, batch: Batch, mode: Mode) -> PipelineOutput:
        """Run a batch; in training, set its gradients aside."""
        if mode != "train" or not isinstance(batch, Batch):  # others are refused
            return self._runner(batch, mode)
        if self._stash is not None:
            raise ValueError("training_step called self.pipeline(batch) twice; one batch is one step")
        parameters = self._trained()
        if self._first_of_step:
            for parameter in parameters:
                parameter.grad = None
            wide = self._sums_in_float32(batch)
            accumulate_in(torch.float32 if wide else None, parameters)
        scaler = getattr(self._precision, "scaler", None)
        one = torch.ones((), dtype=torch.float32, device=self._runner.mesh.device)
        scale = one if scaler is None else scaler.scale(one)
        self._runner.gradient_scale = scale if batch.step_counts else scale / self._batches
        with hooks.disabled(parameters):
            output = self._runner(batch, mode)
        self._stash = [(parameter, parameter.grad) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        self._loss = output.loss
        if not self._warned:
            self._warned = True
            self._warn_of_waste()
        return output

    def check(self, output: Any) -> None:
        """Refuse what `training_step` has returned, if it is not the loss of the pipeline.

        Raises:
            ValueError: says what to do instead.
        """
        loss = output.get("loss") if isinstance(output, dict) else output
        if self._loss is None or loss is not self._loss:
            raise ValueError(
                f"{type(self._module).__name__}.training_step must return the loss of self.pipeline(batch) "
                "as it is (out.loss): the pipeline has already computed its gradients, so a changed loss would be "
                "ignored. Weights of loss parts go into the module's loss_weights."
            )

    def restore_gradients(self, last_of_step: bool) -> None:
        """Let the parameters have their gradients.

        Collective if this ends an optimizer step: they are then those of all ranks, in the type that optimizers expect,
        and users' hooks have seen them.
        """
        assert self._stash is not None, "backward without a pipeline run"
        for parameter, gradient in self._stash:
            parameter.grad = gradient
        self._stash = None
        if last_of_step:
            reduce_gradients(self._runner.places, self._runner.mesh)
            for buffers in self._buffers:
                buffers.synchronize()
            parameters = self._trained()
            round_gradients(parameters)
            hooks.call(parameters)

    def _warn_of_waste(self) -> None:
        """Of a plan, the first batch's, in which ranks have little to do."""
        plan = self._runner.last_plan
        if plan is None:
            return
        size, bubbles = plan.pipeline_parallel_size, simulate(plan).bubble_share
        if plan.microbatches < size or bubbles > MANY_BUBBLES:
            log.warning(
                "The first batch has %d microbatches for a pipeline of %d ranks, which are idle for about %.0f%% of "
                "the step. Give it more microbatches, or choose another backbone: "
                "bigmac compare --pipeline_parallel_size %d --microbatches %d",
                *(plan.microbatches, size, 100 * bubbles, size, plan.microbatches),
            )

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._module.parameters() if parameter.requires_grad]

    def _sums_in_float32(self, batch: Batch) -> bool:
        """The same on all ranks, and in all of a run."""
        if self._float32_gradients is None:
            most = torch.tensor(len(batch) * self._batches, device=self._runner.mesh.device)
            if dist.get_world_size() > 1:
                dist.all_reduce(most, dist.ReduceOp.MAX)
            self._float32_gradients = most.item() > MANY_MICROBATCHES
        return self._float32_gradients
