"""BigMacStrategy: connects Lightning's Trainer to the pipeline.

It sets up mesh and module. processes.py starts processes, stepping.py and lightning_steps.py run the batches of
Lightning's loop, runner.py plans and executes them, and saving.py reads and writes checkpoints.
"""

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # pyright: ignore[reportPrivateImportUsage]
from torch.optim import Optimizer

from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.contracts.parallel import ParallelSizes
from bigmac_lightning.contracts.slices import with_slices
from bigmac_lightning.estimates.partition import make_stages
from bigmac_lightning.estimates.ranks import ranks_of
from bigmac_lightning.estimates.table import as_text, partition_table
from bigmac_lightning.runtime.gradients import clip_gradients
from bigmac_lightning.runtime.mesh import build_mesh, mesh_shape
from bigmac_lightning.runtime.sharding import is_rows, local
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training import refusals, run_facts
from bigmac_lightning.training.accumulation_loader import counting, rewinding
from bigmac_lightning.training.agreement import check_same
from bigmac_lightning.training.batch_agreement import BatchAgreement, When
from bigmac_lightning.training.batch_facts import fingerprint
from bigmac_lightning.training.compiling import arguments_of, compile_layers
from bigmac_lightning.training.grad_scaler import PipelineGradScaler
from bigmac_lightning.training.holding import take_part
from bigmac_lightning.training.known_costs import check_known, known_rates
from bigmac_lightning.training.lightning_steps import LightningSteps, OnNonfinite
from bigmac_lightning.training.master_weights import with_master_weights
from bigmac_lightning.training.measuring import Measuring
from bigmac_lightning.training.nonfinite import FiniteCheck
from bigmac_lightning.training.offloading import to_device
from bigmac_lightning.training.optimizers import accepting_nothing, step_one_by_one
from bigmac_lightning.training.options import PipelineOptions, ShardingOptions, StageOptions
from bigmac_lightning.training.parent import outlive_parent
from bigmac_lightning.training.planner import PlanningCollate
from bigmac_lightning.training.processes import DEFAULT_TIMEOUT
from bigmac_lightning.training.replicas import check_replicas
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.sharding import check_whole, shard_meshes
from bigmac_lightning.training.stages import part_of, peers_of, resolve_options, typical_microbatch
from bigmac_lightning.training.stepping import SteppingStrategy
from bigmac_lightning.training.watching import Watching
from bigmac_lightning.training.whole_summary import show_own_part, show_whole_model

log = logging.getLogger(__name__)

DEFAULT_HANG_TIMEOUT = timedelta(minutes=10)

NOT_COMPARED = (
    "self",
    "__class__",
    "accelerator",
    "parallel_devices",
    "cluster_environment",
    "checkpoint_io",
    "precision_plugin",
)
"""Arguments of the strategy that may differ between ranks, or that Lightning gives."""


class BigMacStrategy(SteppingStrategy):
    """Pipeline parallelism with encoder and generator work nested into the LLM's schedule.

    ``Trainer(strategy="bigmac", devices=N)`` after ``import bigmac_lightning``, or an instance of this class.

    Args:
        pipeline_parallel_size: number of ranks per pipeline; "auto": the number of processes, divided by
            `data_parallel_size` if that is given.
        data_parallel_size: number of pipelines; "auto": the number of processes / `pipeline_parallel_size`.
        tensor_parallel_size: over how many processes the weights of a stage are divided, which compute the same tokens.
        context_parallel_size: over how many processes the rows of a stage's microbatches are divided.
        expert_parallel_size: over how many processes the experts of a mixture are spread: 1, or the tensor peers.
        microbatches: how many microbatches every training batch must have; ``None``: as many as the DataModule makes.
        schedule: how plans are made: policy, backbone, sizes of groups, costs, limits. Rank 0 logs what "auto" in it
            has become, and why.
        stages: how the LLM is cut into stages.
        sharding: which weights, gradients and optimizer states lie in shards on several ranks.
        float32_gradients: whether gradients of bfloat16 and float16 weights are summed in float32 and rounded once,
            which takes 2 more bytes per trained weight; ``None``: if an optimizer step sums those of more than 8
            microbatches. Gradients in shards have the type of the shards (see `ShardingOptions.master_weights`).
        accumulate: how gradients are averaged over the batches of `Trainer(accumulate_grad_batches=N)`. "batches":
            each batch counts alike, as in Lightning, so a token of a batch with few tokens counts more. "tokens": each
            token counts alike, as in one large batch, and so does each target of a generator; the batches of a step are
            read ahead for that.
        compile: whether the layers of encoders, LLM and generators (members of their `nn.ModuleList`s) are compiled one
            by one by torch.compile; or a dict of its arguments, such as ``{"mode": "max-autotune-no-cudagraphs"}``.
        check_batches: which batches are compared between the ranks of a pipeline before they run: "every" one, the
            "first" one, or "never". Ranks that have different tokens, labels, items or plans end with an error.
        on_nonfinite: what is done about an optimizer step whose loss or gradients are NaN or infinite: "raise" an error
            on all ranks, which says where it began, before any weight changes; "skip": leave the optimizer's step out,
            as a gradient scaler does, and log "skipped_steps"; "ignore": nothing. With precision 16-mixed, gradients
            are the scaler's business, and only losses are looked at.
        check_replicas_every: after every how many optimizer steps ranks compare sums over the bits of the weights and
            gradients that they have alike, and end with an error if they differ; ``None``: never.
        process_group_backend: "nccl", "gloo", ...; ``None``: the device's default. With "gloo" on GPUs, messages and
            collectives go through the host's memory, so that several ranks can share a card.
        ranks_per_device: how many ranks share each of the Trainer's `devices`; more than one on a GPU needs
            `process_group_backend` "gloo".
        timeout: timeout of every process group.
        hang_timeout: how long a rank may do nothing new in training or evaluation. Then all ranks say what they are
            doing, and end. "auto": 10 minutes, or 9/10 of `timeout` if that is shorter; ``None``: as long as it likes.
        save_distributed_checkpoint: whether each rank writes its part into a directory, which any number of ranks can
            read; ``False``: rank 0 gathers everything into one file.
        async_save: whether training goes on while checkpoints are written. The state is first copied to the CPU's
            memory. One save is in flight at a time: the next one waits for it, and so does the end of the run. An error
            in it is raised there, on all ranks.
        checkpoint_weights_only: ``False``: read checkpoints that hold more than tensors and plain values. Such a
            checkpoint can run any code when it is read, so its origin must be trusted. ``None``: as ``True``.
        start_method: how `Trainer(devices=N)` starts processes.

    Raises:
        ValueError: an argument is not possible; the message says what is expected.
    """

    strategy_name = "bigmac"

    def __init__(
        self,
        pipeline_parallel_size: int | Literal["auto"] = "auto",
        data_parallel_size: int | Literal["auto"] = "auto",
        tensor_parallel_size: int = 1,
        context_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        microbatches: int | None = None,
        schedule: ScheduleOptions = ScheduleOptions(),  # noqa: B008  (frozen)
        stages: StageOptions = StageOptions(),  # noqa: B008  (frozen)
        sharding: ShardingOptions = ShardingOptions(),  # noqa: B008  (frozen)
        float32_gradients: bool | None = None,
        accumulate: Literal["batches", "tokens"] = "batches",
        compile: bool | dict[str, Any] = False,
        check_batches: When = "every",
        on_nonfinite: OnNonfinite = "raise",
        check_replicas_every: int | None = None,
        process_group_backend: str | None = None,
        ranks_per_device: int = 1,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        hang_timeout: timedelta | Literal["auto"] | None = "auto",
        save_distributed_checkpoint: bool = True,
        async_save: bool = False,
        checkpoint_weights_only: bool | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        self._settings = {name: value for name, value in locals().items() if name not in NOT_COMPARED}
        super().__init__(
            ranks_per_device=ranks_per_device,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            save_distributed_checkpoint=save_distributed_checkpoint,
            async_save=async_save,
            checkpoint_weights_only=checkpoint_weights_only,
        )
        for name, value, otherwise in (
            ("pipeline_parallel_size", pipeline_parallel_size, "auto"),
            ("data_parallel_size", data_parallel_size, "auto"),
            ("tensor_parallel_size", tensor_parallel_size, 1),
            ("context_parallel_size", context_parallel_size, 1),
            ("expert_parallel_size", expert_parallel_size, 1),
            ("microbatches", microbatches, None),
            ("check_replicas_every", check_replicas_every, None),
            ("ranks_per_device", ranks_per_device, 1),
        ):
            if value != otherwise and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be an integer of at least 1, or {otherwise!r}")
        self.sizes: tuple[int | str, int | str] = (pipeline_parallel_size, data_parallel_size)
        parallel = ParallelSizes(tensor_parallel_size, context_parallel_size, expert_parallel_size)
        self.options = self._options = PipelineOptions.of(schedule, stages, microbatches, sharding, parallel)
        if accumulate not in ("batches", "tokens"):
            raise ValueError(f'accumulate={accumulate!r}: choose "batches" or "tokens"')
        if float32_gradients and sharding != ShardingOptions():
            raise ValueError(
                "float32_gradients=True does not go with sharding, as shards hold gradients of their weights' type: "
                "leave it out, and set sharding.master_weights, or train with weights of float32 (precision 32-true or "
                "bf16-mixed)"
            )
        if hang_timeout == "auto":
            hang_timeout = min(DEFAULT_HANG_TIMEOUT, 0.9 * (timeout or DEFAULT_TIMEOUT))
        if hang_timeout is not None and not timedelta(0) < hang_timeout < (timeout or timedelta.max):
            raise ValueError(f"hang_timeout={hang_timeout} must be more than 0, and less than timeout={timeout}")
        self._hang_timeout = hang_timeout
        if check_batches not in ("every", "first", "never"):
            raise ValueError(f'check_batches={check_batches!r}: choose "every", "first" or "never"')
        if on_nonfinite not in ("raise", "skip", "ignore"):
            raise ValueError(f'on_nonfinite={on_nonfinite!r}: choose "raise", "skip" or "ignore"')
        self._on_nonfinite, self._check_replicas_every = on_nonfinite, check_replicas_every
        self._compile = arguments_of(compile, parallel)
        self._check_batches: When = check_batches
        self.float32_gradients, self._accumulate = float32_gradients, accumulate

    # -- processes -----------------------------------------------------------------------------------------------------

    @property
    def pipeline_layout(self) -> PipelineLayout:
        """This rank's place in the pipeline, for a DataModule's collate function."""
        return self._options.layout(self.mesh.pp_size, self.mesh.pp_rank, self.mesh.peer)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.mesh.dp_size, "rank": self.mesh.dp_rank}

    def mesh_shape(self, module: PipelineModule) -> tuple[int, int]:
        """The numbers of pipelines and of ranks of each, (dp, pp). Other processes are not needed for that.

        Raises:
            ValueError: the processes cannot form such a mesh, or the model cannot be divided so.
        """
        parallel = self.options.parallel
        dp, pp = mesh_shape(self.num_nodes * self.num_processes, *self.sizes, peers=parallel.peers)
        if reason := module.llm.why_not_parallel(parallel):
            raise ValueError(reason)
        schedule = self.options.schedule
        if not schedule.has_auto and not schedule.own_ranks:
            make_stages(module.llm.costs(), len(self.options.stage_rank(pp)), self.options.partition)
        if self.options.sharding.stages == "fsdp" and dp > 1 and module.llm.attends_to_features:
            raise ValueError(
                "sharding.stages is fsdp, but layers of this LLM attend to images and do not run where there are none, "
                "so ranks with shards of one layer would not meet: use zero1 or ddp"
            )
        if self.options.sharding.stages == "fsdp" and dp > 1 and self.options.microbatches is None:
            raise ValueError(
                "sharding.stages is fsdp, so all pipelines must run equally many microbatches: give the strategy "
                "microbatches=N, and the DataModule a batch size that makes so many"
            )
        return dp, pp

    def setup_environment(self) -> None:
        module = self.lightning_module
        assert self.cluster_environment is not None
        if not isinstance(module, PipelineModule):
            raise TypeError(
                f"strategy='bigmac' trains a bigmac_lightning.PipelineModule, but {type(module).__name__} is none: "
                "derive it from PipelineModule (encoders, llm, generators; self.pipeline(batch) in its steps)"
            )
        super().setup_environment()
        known = run_facts.settings(module.trainer, module, self.precision_plugin, self._settings)
        self._watching = self._watching or Watching(module.trainer, self.progress, self._hang_timeout, self._timeout)
        check_same(self._ranks, known, "settings")  # before the ranks do anything else together
        self.check_remote_folders(module.trainer)
        self.precision_plugin = with_master_weights(self.precision_plugin, self.options.sharding)
        parallel = self.options.parallel
        dp, pp = self.mesh_shape(module)
        if self.options.known is not None:
            file = self.options.schedule.costs_file
            check_known(self.options.known, str(file), module, self.precision_plugin.precision, self.root_device.type)
        data = getattr(module.trainer, "datamodule", None)
        self._options, stages, reason = resolve_options(module, self.options, pp, typical_microbatch(module, data))
        stage_rank = self._options.stage_rank(pp)
        if reason:
            rank_zero_info(reason)
        if self._mesh is None:
            sizes = {"cp": parallel.context, "tp": parallel.tensor}
            self._mesh = build_mesh(self.root_device, dp, pp, stage_rank, self._timeout, **sizes)
        self.open_module()
        part = part_of(self.mesh.pp_rank, stages, stage_rank)
        shards = shard_meshes(module, self.mesh, self.options.sharding)
        shards = {name: ranks for name, ranks in shards.items() if ranks.size() > 1}
        take_part(module, replace(part, peers=peers_of(self.mesh, parallel), shards=shards))
        module._device_mesh = self.device_mesh
        if self.options.partition != "even" and not module._materialized:
            rank_zero_info(as_text(partition_table(ranks_of(module, self._options, stages, pp))))

    def process_dataloader(self, dataloader: object) -> object:
        """Let workers plan the batches that they load, and seed them by replica instead of by rank, because all ranks
        of a pipeline must see the same samples."""
        collate = getattr(dataloader, "collate_fn", None)
        if callable(collate) and self._runner is not None:
            given = collate.collate if isinstance(collate, PlanningCollate) else collate
            training = self.lightning_module is not None and self.lightning_module.trainer.training
            planner = self.runner.planner if training else self.runner.evaluation_planner
            planned = PlanningCollate(given, planner, self._check_batches == "every")
            dataloader.collate_fn = planned  # pyright: ignore[reportAttributeAccessIssue]
        if int(os.environ.get("PL_SEED_WORKERS", 0)) and getattr(dataloader, "worker_init_fn", 0) is None:
            worker_init = partial(pl_worker_init_function, rank=self.distributed_sampler_kwargs["rank"])
            dataloader.worker_init_fn = worker_init  # pyright: ignore[reportAttributeAccessIssue]
        module = self.lightning_module
        if not isinstance(module, PipelineModule) or not module.trainer.training:
            return dataloader
        if self._accumulate == "tokens":
            return counting(dataloader, module.trainer, module.counts)
        return rewinding(dataloader, module.trainer)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Prepare a batch while it is on the CPU. On the device, this would wait for the device."""
        module = self.lightning_module
        if isinstance(batch, Batch) and isinstance(module, PipelineModule):
            if self._check_batches == "every" and batch.fingerprint is None:
                batch = batch.replace(fingerprint=fingerprint(batch))
            batch = module.prepare(batch)
            if self.mesh.cp_size > 1:
                batch = with_slices(batch, self.mesh.cp_rank, self.mesh.cp_size)
        return super().batch_to_device(batch, device, dataloader_idx)

    # -- model and optimizers ------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        module = self.lightning_module
        assert isinstance(module, PipelineModule)
        refusals.check_settings(trainer, module, self.precision_plugin, self._layer_sync)
        if self.mesh.pp_size > 1:
            refusals.check_norms(trainer, module)
        self.check_checkpoint_plugins(trainer)
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(module)
        self.model_to_device()
        known = self._runner.sharding if self._runner is not None and self._runner.module is module else None
        part = run_facts.llm_part(self.mesh)
        if known is None:
            check_same(self._ranks, run_facts.weights(module, part), "the model")
            check_whole(module)
            self._synchronize_initial_state(module)
            if self._compile is not None:
                rank_zero_info(compile_layers(module, self._compile))
        context = self.precision_plugin.forward_context
        computing = getattr(self.precision_plugin, "computing", None)  # of a `MasterPrecision`
        agreement = BatchAgreement(self._ranks, self.mesh, self._check_batches)
        finite = None
        if self._on_nonfinite != "ignore":
            unscaled = getattr(self.precision_plugin, "scaler", None) is None
            finite = FiniteCheck(self._ranks, module, self.mesh, gradients=unscaled)
        measuring = None
        if self._options.schedule.given_costs is None and trainer.state.fn == TrainerFn.FITTING:
            measuring = Measuring(self._ranks, self.root_device, self._options.sharding.meeting)
        checks = (agreement, finite, measuring, known_rates(module, self._options, self.mesh.pp_size))
        self._runner = PipelineRunner(module, self.mesh, self._options, context, known, computing, *checks)
        self._runner.executor.progress = self.progress
        refusals.check_averaging(trainer, self._runner.sharding.sharded)
        compare = partial(check_replicas, self._ranks, module, self.mesh, self._runner.sharding)
        self._steps = LightningSteps(
            module,
            self._runner,
            self.precision_plugin,
            self._float32_before if self.float32_gradients is None else self.float32_gradients,
            self._on_nonfinite,
            self._check_replicas_every,
            compare,
        )
        module.runner = self._steps
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._runner.trained.check_any()
            self._reset_optimizers_and_schedulers()
            with accepting_nothing():
                self.setup_optimizers(trainer)
            for optimizer in self.optimizers:
                refusals.check_optimizer(optimizer, self.precision_plugin)
                step_one_by_one(optimizer)
            found = run_facts.optimizers(module, self.optimizers, self.lr_scheduler_configs, part)
            check_same(self._ranks, found, "optimizers")
            show_whole_model(trainer, module, self.mesh)
        self.setup_precision_plugin()
        if fitting and not self.options.sharding.offload:  # an offloaded weight's states are beside it already
            _optimizers_to_device(self.optimizers, self.root_device)
        self.barrier()
        if self._watching is not None:
            self._watching.expect_loops(self._world_group)

    def model_to_device(self) -> None:
        assert isinstance(self.model, PipelineModule)
        to_device(self.model, self.root_device, self.options.sharding)

    def _synchronize_initial_state(self, module: PipelineModule) -> None:
        """Broadcast weights and buffers of the first replica, as a component may be initialised without a seed."""
        groups = {True: self.mesh.data_group, False: None}
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            is_llm = name.startswith("llm.")
            group = groups[is_llm]
            if is_rows(tensor):  # other ranks have others, or each replica has them
                if is_llm or self.options.sharding.of_component(name) == "zero1":
                    continue
                group = self.mesh.dp_group
            if dist.get_world_size(group) > 1:
                own, source = local(tensor.detach()), 0 if group is None else dist.get_global_rank(group, 0)
                sent = own.to(self.root_device)  # what is offloaded is on the CPU
                dist.broadcast(sent, source, group=group)
                own.copy_(sent)

    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        plugin: Any = self.precision_plugin
        plugin.clip_grad_by_norm = self._clip_by_global_norm  # the plugin's own would see this rank's parameters only
        scaler = getattr(plugin, "scaler", None)
        if scaler is not None and not isinstance(scaler, PipelineGradScaler):
            plugin.scaler = PipelineGradScaler.like(scaler, self.root_device)

    def _clip_by_global_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        clip_gradients(parameters, clip_val, self.runner.gradient_norm())

    def teardown(self) -> None:
        module = self.lightning_module
        outlive_parent()
        if isinstance(module, PipelineModule):
            trainer, started_here = module._trainer, isinstance(self.cluster_environment, LightningEnvironment)
            well = trainer is not None and trainer.state.status == TrainerStatus.RUNNING
            if well and started_here and dist.is_initialized():
                self.barrier()  # no rank's process ends before all outlive it
            if trainer is not None:
                show_own_part(trainer)
            self.close_module()
            self._float32_before = None
            if any(parameter.is_meta for parameter in module.parameters()):
                self._lightning_module = None  # after an error in setup there are no weights to move to the CPU
        if self._watching is not None:
            self._watching.stop()
            self._watching = None
        super().teardown()

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        offloads = bool(self.options.sharding.offload)  # the device might not have room for all whole weights
        with super().tensor_init_context(empty_init=False), torch.device("cpu") if offloads else nullcontext():
            yield
