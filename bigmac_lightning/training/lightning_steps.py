"""Runs the batches of Lightning's loop through the pipeline.

Lightning zeroes gradients between `training_step` and `backward`, but a pipeline runs its backward inside
`training_step`. So gradients are set aside there and restored in `backward`: zeroing, accumulation, clipping, precision
plugins, schedulers and hooks then behave as in plain training.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.contracts.growing_text import GrowingText
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.contracts.outputs import Mode, PipelineOutput
from bigmac_lightning.runtime import hooks
from bigmac_lightning.runtime.buffers import ReplicatedBuffers
from bigmac_lightning.runtime.gradients import accumulate_in, round_gradients, unequal_gradients
from bigmac_lightning.schedule.simulate import simulate
from bigmac_lightning.training.nonfinite import FiniteCheck
from bigmac_lightning.training.options import MANY_MICROBATCHES
from bigmac_lightning.training.runner import PipelineRunner

log = logging.getLogger(__name__)

OnNonfinite = Literal["raise", "skip", "ignore"]

MANY_BUBBLES = 1 / 3
"""Above this share of idle time a warning is logged. 1F1B has it with two microbatches per rank: (P-1) / (3P-1)."""


class LightningSteps:
    """Runs the batches of a module that is trained or evaluated; `PipelineModule.pipeline` calls it.

    Attributes:
        last_of_step: whether the next batch is the last one of an optimizer step.
        skipped: how many optimizer steps were left out because they were not finite.
        float32_gradients: see below; ``None`` until it is found out, with the first batch.

    Args:
        float32_gradients: whether gradients of 16-bit weights are summed in float32; ``None``: if an optimizer step has
            more than `MANY_MICROBATCHES` microbatches.
        on_nonfinite: what is done about an optimizer step that is not finite.
        check_every: every how many optimizer steps `check_replicas` is called, before the step; ``None``: never.
        check_replicas: compares weights and gradients between ranks; collective.
    """

    def __init__(
        self,
        module: PipelineModule,
        runner: PipelineRunner,
        precision: Precision,
        float32_gradients: bool | None,
        on_nonfinite: OnNonfinite = "ignore",
        check_every: int | None = None,
        check_replicas: Callable[[], None] | None = None,
    ) -> None:
        self._check_every, self._check_replicas = check_every, check_replicas
        self._on_nonfinite: OnNonfinite = on_nonfinite
        self.skipped, self._skips = 0, False
        self._module, self._runner, self._precision = module, runner, precision
        self.float32_gradients = float32_gradients
        self._loss: Tensor | None = None
        self._stash: list[tuple[nn.Parameter, Tensor | None]] | None = None
        self._first_of_step = self.last_of_step = True
        self._batches = 1  # in an optimizer step
        self._warned, self._compared = dist.get_rank() > 0, False
        mesh = runner.mesh
        self._buffers = [ReplicatedBuffers([module.encoders, module.generators], None)] * (dist.get_world_size() > 1)
        self._buffers += [ReplicatedBuffers([module.llm], mesh.data_group)] * (mesh.dp_size * mesh.cp_size > 1)

    def gradient_norm(self) -> Tensor:
        """See `PipelineModule.gradient_norm`."""
        return self._runner.gradient_norm()

    def write(self, texts: Sequence[GrowingText], choose: Callable[[int, Tensor], int]) -> list[int]:
        """See `PipelineModule.write`."""
        return self._runner.write(texts, choose)

    def start(self, trainer: pl.Trainer, batch_idx: int) -> None:
        """Prepare for a training batch. Collective over the pipeline."""
        self._batches = trainer.accumulate_grad_batches
        self._first_of_step = batch_idx % self._batches == 0
        self._runner.step = trainer.fit_loop.total_batch_idx
        self._runner.refresh(within_step=not self._first_of_step)  # a callback may have frozen or unfrozen something
        self._loss = self._stash = None

    def __call__(self, batch: Batch, mode: Mode) -> PipelineOutput:
        """Run a batch; in training, set its gradients aside. If it is the last one of an optimizer step, they are
        summed over all ranks meanwhile."""
        if mode != "train" or not isinstance(batch, Batch):  # the runner refuses other types
            return self._runner(batch, mode)
        if self._stash is not None:
            raise ValueError("training_step called self.pipeline(batch) twice; one batch is one step")
        parameters = self._trained()
        finite = self._runner.finite
        if self._first_of_step:
            if finite is not None:
                finite.begin()
            self._runner.sharding.forget_used()
            for parameter in parameters:
                parameter.grad = None
            wide = self._sums_in_float32(batch)
            accumulate_in(torch.float32 if wide else None, parameters)
        scaler = getattr(self._precision, "scaler", None)
        one = torch.ones((), dtype=torch.float32, device=self._runner.mesh.device)
        scale = one if scaler is None else scaler.scale(one)
        self._runner.gradient_scale = scale if batch.step_counts else scale / self._batches
        with hooks.disabled(parameters):
            output = self._runner(batch, mode, reduce=self.last_of_step)
        if finite is not None and self.last_of_step:
            self._skips = finite.failed
            if finite.failed:
                self._refuse_or_skip(finite)
        self._stash = [(parameter, parameter.grad) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        self._loss = output.loss
        if not self._warned:
            self._warned = True
            self._warn_of_waste()
        return output

    def check(self, output: Any) -> None:
        """Check that `training_step` has returned the loss of the pipeline.

        Raises:
            ValueError: it has returned something else; the message says what to do instead.
        """
        loss = output.get("loss") if isinstance(output, dict) else output
        if self._loss is None or loss is not self._loss:
            raise ValueError(
                f"{type(self._module).__name__}.training_step must return the loss of self.pipeline(batch) "
                "as it is (out.loss): the pipeline has already computed its gradients, so a changed loss would be "
                "ignored. Weights of loss parts go into the module's loss_weights."
            )

    def restore_gradients(self) -> None:
        """Put the gradients that were set aside back into the parameters.

        If this ends an optimizer step, they are also converted to the type that optimizers expect, and passed to users'
        hooks. Collective then.
        """
        assert self._stash is not None, "backward without a pipeline run"
        for parameter, gradient in self._stash:
            parameter.grad = gradient
        self._stash = None
        if self.last_of_step and self._skips:
            for buffers in self._buffers:
                buffers.synchronize()
            for parameter in self._trained():
                parameter.grad = None  # optimizers pass over it
        elif self.last_of_step:
            self._check_tensor_peers()
            for buffers in self._buffers:
                buffers.synchronize()
            parameters = self._trained()
            round_gradients(parameters)
            if self._check_replicas is not None and self._check_every and self._steps_done() % self._check_every == 0:
                self._check_replicas()
            hooks.call(parameters)

    def _steps_done(self) -> int:
        return self._module.trainer.global_step

    def _refuse_or_skip(self, finite: FiniteCheck) -> None:
        """Raise the error about a step that is not finite, or count it. Collective.

        Raises:
            ValueError: such steps are not to be left out; raised on all ranks.
        """
        text = f"the loss or a gradient of optimizer step {self._steps_done()} is NaN or infinite; {finite.explain()}"
        if self._on_nonfinite == "raise":
            raise ValueError(
                f"{text}\nNo weight was changed. Trainer(detect_anomaly=True) finds the operation in a backward; "
                'BigMacStrategy(on_nonfinite="skip") leaves out such steps'
            )
        self.skipped += 1
        if dist.get_rank() == 0:
            log.warning("Skipped, as %s", text)

    def _check_tensor_peers(self) -> None:
        """Compare the tensor peers' gradients after the first step, because a model's plan may be wrong.

        Raises:
            RuntimeError: they are not equal; raised on all peers.
        """
        mesh = self._runner.mesh
        if self._compared or mesh.tp_size == 1:
            return
        self._compared = True
        parameters = dict(self._module.llm.named_parameters())
        if wrong := unequal_gradients(parameters, mesh.mesh.get_group("tp"), mesh.device):
            raise RuntimeError(
                f"the gradients of {wrong[0]} and {len(wrong) - 1} more parameters are not the same on the tensor "
                f"peers, as transformers' plan for {type(self._module.llm).__name__} leaves them out: set "
                "tensor_parallel_size to 1, and please report the model type"
            )

    def _warn_of_waste(self) -> None:
        """Log a warning if ranks are idle for much of the first batch's plan."""
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
        """Whether gradients are summed in float32: the same on all ranks, and for the whole run."""
        if self.float32_gradients is None:
            most = torch.tensor(len(batch) * self._batches, device=self._runner.mesh.device)
            if dist.get_world_size() > 1:
                dist.all_reduce(most, dist.ReduceOp.MAX)
            self.float32_gradients = most.item() > MANY_MICROBATCHES
        return self.float32_gradients
