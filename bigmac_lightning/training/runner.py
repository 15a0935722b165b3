"""Runs a PipelineModule's batches through the runtime: a plan per batch, and one result on all ranks."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.contracts.growing_text import GrowingText
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.contracts.outputs import Mode, PipelineOutput
from bigmac_lightning.estimates.partition import make_stages
from bigmac_lightning.host import from_host
from bigmac_lightning.runtime.autocast import one_cache
from bigmac_lightning.runtime.executor import Executor
from bigmac_lightning.runtime.gradients import Reductions, SharedParameters, global_norm
from bigmac_lightning.runtime.lowering import Compute, Hint, Soon
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.runtime.randomness import seeded
from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.backbones import get_backbone
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.rates import Rates, described
from bigmac_lightning.training.batch_agreement import BatchAgreement
from bigmac_lightning.training.batch_checks import check_batch, check_ids
from bigmac_lightning.training.batch_computation import BatchComputation
from bigmac_lightning.training.batch_facts import fingerprint
from bigmac_lightning.training.explaining import alive_in_plan, explain
from bigmac_lightning.training.known_costs import KnownRates
from bigmac_lightning.training.measuring import Measuring
from bigmac_lightning.training.memory_report import is_out_of_memory
from bigmac_lightning.training.nonfinite import FiniteCheck
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.planner import PlannedBatch, Planner
from bigmac_lightning.training.sharding import Sharding
from bigmac_lightning.training.text_writing import TextWriter
from bigmac_lightning.training.trained import Trained, TrainedParts, nested_kinds


class PipelineRunner:
    """Runs batches of a PipelineModule on one rank of a pipeline.

    Training adds the gradients of this rank's actions to ``.grad``; reduce them with `runtime.gradients`, using
    `places`.

    Attributes:
        gradient_scale: factor of all gradients.
        step: number of the training step, which seeds the random numbers that ranks draw.

    Args:
        module: the module with the weights of this rank's part of the LLM.
        forward_context: context manager that every forward runs in (for precision).
        sharding: the module's shards, if it was sharded before; ``None``: it is sharded as the options say.
        computing: the 16-bit type in which the model computes if shards are float32; ``None``: that of the weights.
        agreement: compares batches between ranks before they run; ``None``: nothing does.
        finite: finds out whether training steps are finite; ``None``: nothing does.
        measuring: measures how long actions take, from which plans are then made; ``None``: nothing does.
        known: times from which plans are made before; ``None``: there are none.
    """

    def __init__(
        self,
        module: PipelineModule,
        mesh: PipelineMesh,
        options: PipelineOptions,
        forward_context: Callable[[], AbstractContextManager[object]] = nullcontext,
        sharding: Sharding | None = None,
        computing: torch.dtype | None = None,
        agreement: BatchAgreement | None = None,
        finite: FiniteCheck | None = None,
        measuring: Measuring | None = None,
        known: KnownRates | None = None,
    ) -> None:
        self._known = known
        self.agreement, self.finite, self.measuring = agreement, finite, measuring
        self.stage_rank = tuple(options.stage_rank(mesh.pp_size))
        self.stages = make_stages(module.llm.costs(), len(self.stage_rank), options.partition)
        self.dtype = computing or _find_dtype(module, mesh, self.stage_rank)
        own_stages = [stage for stage, rank in zip(self.stages, self.stage_rank, strict=True) if rank == mesh.pp_rank]
        self.sharding = sharding or Sharding(module, mesh, options.sharding, own_stages, computing)
        self.module, self.mesh, self.options, self.forward_context = module, mesh, options, forward_context
        self._splits = get_backbone(options.schedule.backbone).splits
        self.layout = options.layout(mesh.pp_size, mesh.pp_rank, mesh.peer)
        self.executor = Executor(mesh, self.stage_rank)
        self._last_planned: PlannedBatch | None = None
        self.last_metrics: dict[str, Tensor] = {}
        self.gradient_scale: Tensor | float = 1.0
        self.seed, self.step = torch.initial_seed(), 0
        self._evaluated = 0
        self._seen: set[Mode] = set()
        self.trained = TrainedParts(module, mesh, self.stage_rank, self.sharding)
        nothing, place = Trained.nothing(len(self.stages)), (mesh.pp_size, mesh.pp_rank)
        alike = nested_kinds(module) if self.sharding.meets("llm") else None
        self.planner = Planner(options, *place, nothing, module.encoders, alike)
        self.evaluation_planner = Planner(options, *place, nothing, module.encoders)
        self._writer = TextWriter(module, self.stages, self.executor, self.dtype, forward_context, self.sharding)
        self.refresh()

    def write(self, texts: Sequence[GrowingText], choose: Callable[[int, Tensor], int]) -> list[int]:
        """See `PipelineModule.write`. Collective over the pipeline."""
        return self._writer.write(texts, choose)

    def begin_evaluation(self, step: int) -> None:
        """Count the batches of an evaluation anew.

        Args:
            step: number of the last training step.
        """
        self.step, self._evaluated = step, 0

    def refresh(self, within_step: bool = False) -> None:
        """Find out again what is trained, as callbacks freeze and unfreeze. Collective over the pipeline; see
        `TrainedParts.refresh`."""
        self.sharding.release()
        if self.trained.refresh(within_step):
            self.planner.trained = self.trained.now
            if self.measuring is not None:
                self.measuring.forget()
                self.planner.rates = self.measuring.rates = self._known_rates()
            self.executor.splits.clear()

    def _known_rates(self) -> Rates | None:
        """The times that are known of what is trained now."""
        if self._known is None or self._known.trained == self.trained.now.names:
            return None if self._known is None else self._known.rates
        there, here = (", ".join(names) or "nothing" for names in (self._known.trained, self.trained.now.names))
        rank_zero_warn(
            f"The costs of the file were measured with these trained: {there}; now these are: {here}. So only their "
            "ratios are used, until times have been measured"
        )
        return None

    @property
    def last_plan(self) -> Plan | None:
        """The plan of the last batch that was not empty; ``None`` before it."""
        return None if self._last_planned is None else self._last_planned.plan

    @property
    def last_planned(self) -> PlannedBatch | None:
        """What this rank needs of the plan of the last batch that was not empty; ``None`` before it."""
        return self._last_planned

    @property
    def places(self) -> list[SharedParameters]:
        """Which of this rank's trained parameters other ranks have as well."""
        return self.trained.places

    def gradient_norm(self) -> Tensor:
        """2-norm of all gradients of the model, once they are reduced; the same scalar on every rank. Collective."""
        return global_norm(self.places, self.mesh)

    # -- one batch ---------------------------------------------------------------------------------------------------

    def __call__(self, batch: Batch, mode: Mode, reduce: bool = False) -> PipelineOutput:
        """Run a batch; see `PipelineModule.pipeline`.

        Collective over the world in training, and over the pipeline in evaluation, where replicas may have different
        numbers of batches.

        Args:
            reduce: whether to replace gradients by their sums over all ranks, each part's as soon as it is there.
        """
        given = batch
        batch, planned = self._prepared(given, mode)
        module, training = self.module, mode == "train"
        finite = self.finite if training else None
        own = module.counts(given)
        known = from_host([own, given.step_counts or own], module.sum_dtype, self.mesh.device)
        if training and self.mesh.dp_size > 1:
            self.executor.progress.begin("counting the batches of all pipelines", together=True)
            dist.all_reduce(known, group=self.mesh.dp_group)
        counts, step_counts = known  # of the batch, and of its whole optimizer step
        has_loss = any(microbatch.is_useful for microbatch in given.microbatches)
        sums = torch.zeros_like(counts)
        predictions: dict[int, Tensor] = {}
        samples: dict[tuple[int, int], Tensor] = {}
        reductions = Reductions(self.places, self.mesh, self.sharding.early(self._splits)) if reduce else None
        measuring, work = (self.measuring if training else None), dict[Action, tuple[int, float]]()
        timing = self.executor.timing = None if measuring is None else measuring.start()
        if training:
            self.sharding.gather(has_loss)
        else:
            self.sharding.hold()
        if planned is not None:
            scales, numbers = module.scales(step_counts) * self.gradient_scale, _numbers(given, batch)
            with one_cache(self.mesh.device) as caller, self._own_randomness(mode) as seed:
                contexts = (caller, self.forward_context)
                computation = BatchComputation(
                    module,
                    self.stages,
                    self.mesh,
                    self.dtype,
                    contexts,
                    seed,
                    batch,
                    planned,
                    mode,
                    scales,
                    self.sharding,
                    None if finite is None else finite.record(batch, numbers, len(self.stages)),
                )
                hear = partial(_follow, computation, reductions)
                try:
                    self.executor.run(planned.program, computation, planned.needs, planned.recomputes, hear)
                except Exception as error:
                    self._explain(error, computation, planned, numbers)
                    raise
            if timing is not None:
                work = {one.action: computation.work(one.action) for one in planned.program if isinstance(one, Compute)}
            self._last_planned = planned
            sums, predictions, samples = computation.sums, computation.predictions, computation.samples
        self.executor.progress.begin("the sums of gradients over all ranks", together=True)
        if reductions is not None:
            reductions.all_computed()  # all ranks must start these sums before others over the same ranks
        if training:
            self.sharding.reduce()
        if reductions is not None:
            reductions.wait()
        bad = torch.zeros_like(sums[:1])
        if finite is not None and reductions is not None:
            bad += finite.gradients(p for place in self.places for p in place.parameters.values())
        sums = torch.cat([sums, bad])
        if len(self.mesh.replica_ranks) * (self.mesh.dp_size if training else 1) > 1:
            dist.all_reduce(sums, group=None if training else self.mesh.replica_group)
        sums, bad = sums[:-1], sums[-1]
        flags = [] if finite is None else [finite.flag(sums, bad)]
        if reductions is not None:
            read = reductions.drop_unused(*flags)
            if finite is not None:
                finite.end(read == [1])
        if measuring is not None and measuring.end(timing, work, planned is not None and planned.recomputes):
            self.planner.rates = measuring.rates
            rank_zero_info(f"Plans are made from measured times now: {described(measuring.rates or {})}")
        metrics = self.last_metrics = module.metrics(sums, counts)
        return PipelineOutput(
            loss=metrics["loss"],
            metrics=metrics,
            predictions=None if training else self._share_predictions(batch, predictions),
            samples=self._share_samples(batch, samples) if mode == "sample" else None,
        )

    def _prepared(self, batch: Batch, mode: Mode) -> tuple[Batch, PlannedBatch | None]:
        """What of a batch is run, and its plan; ``None`` if nothing is.

        Raises:
            ValueError, TypeError: the batch does not fit, or is not the same on all ranks; raised on all ranks.
        """
        run, error, planned = batch, None, None
        compares = self.agreement is not None and self.agreement.compares(mode)
        try:
            self.check(batch, mode)
            planner = self.planner if mode == "train" else self.evaluation_planner
            run, known = planner.run_of(batch), batch.planned
            if isinstance(known, PlannedBatch) and known.key == planner.key(run):
                planned = known
            elif run.microbatches:
                planned = planner(run)
        except (TypeError, ValueError) as refusal:
            if not compares:
                raise
            error = refusal
        if self.agreement is not None and compares:
            known = batch.fingerprint if isinstance(batch, Batch) else None
            place = self.step if mode == "train" else self._evaluated
            plan = 0 if planned is None else planned.digest
            numbers = (fingerprint(batch) if known is None else known, plan, place)
            self.executor.progress.begin("the comparison of its batch with those of other ranks", together=True)
            self.agreement.check(batch, numbers, mode, error)
            self.executor.progress.begin("the start of the batch's program", together=True)
        return run, planned

    def check(self, batch: Batch, mode: Mode) -> None:
        """Refuse a batch that does not fit; see `check_batch`."""
        check_batch(batch, mode, self.layout, self.module)
        if mode not in self._seen:  # only once, as reading ids back from the device waits for it
            check_ids(batch, self.module.llm, self.mesh.device)
            self._seen.add(mode)

    def _explain(
        self, error: Exception, computation: BatchComputation, planned: PlannedBatch, numbers: Sequence[int]
    ) -> None:
        """Add to an error what the action has worked on in which it was raised."""
        failed = self.executor.progress.doing
        if isinstance(failed, Compute):
            error.add_note(explain(computation, failed.action, numbers))
            if is_out_of_memory(error):
                budget = self.options.schedule.memory
                error.add_note(alive_in_plan(planned.plan, self.mesh.pp_rank, failed.action, budget))

    def _own_randomness(self, mode: Mode) -> AbstractContextManager[Callable[..., None]]:
        """Within this context ranks draw different random numbers, because layers must not share dropout masks.

        They depend on the place in the run and on the action alone, so that a resumed run draws the same ones, also
        under other plans. The ranks' common random state, by which DataModules may draw the same samples on all ranks,
        stays unchanged.
        """
        step = self.step if mode == "train" else f"{mode} {self.step} {self._evaluated}"
        self._evaluated += mode != "train"
        context = [self.mesh.cp_rank] * (self.mesh.cp_size > 1)  # tensor peers draw the same for the same tokens
        return seeded(self.mesh.device, self.seed, step, self.mesh.dp_rank, self.mesh.pp_rank, *context)

    # -- results for every rank ----------------------------------------------------------------------------------------

    def _share_predictions(self, batch: Batch, predictions: dict[int, Tensor]) -> Tensor:
        result = torch.empty(len(batch.labels), dtype=torch.long, device=self.mesh.device)
        if predictions:
            torch.cat([predictions[m] for m in sorted(predictions)], out=result)
            if self.mesh.cp_size > 1:
                dist.all_reduce(result, group=self.mesh.cp_group)
        if self.mesh.pp_size > 1 and len(result):
            last = self.mesh.pp_ranks[self.stage_rank[-1]]
            dist.broadcast(result, last, group=self.mesh.pp_group)
        return result

    def _share_samples(self, batch: Batch, made: dict[tuple[int, int], Tensor]) -> list[Tensor]:
        places = [(m, i, item) for m, mb in enumerate(batch.microbatches) for i, item in enumerate(mb.targets)]
        results = []
        for m, i, item in places:
            sample = made.get((m, i))
            if sample is None:
                sample = torch.empty(item.shape, dtype=torch.float32, device=self.mesh.device)
            if len(self.mesh.replica_ranks) > 1:
                sample = sample.contiguous()
                owner = self.mesh.replica_ranks[item.owner * self.mesh.peers + item.peer]
                dist.broadcast(sample, owner, group=self.mesh.replica_group)
            results.append(sample)
        return results


def _follow(computation: BatchComputation, reductions: Reductions | None, hint: Hint) -> None:
    """Start what a hint of the program allows."""
    if isinstance(hint, Soon):
        computation.start_gathering(hint.action.kind, hint.action.index)
    elif reductions is not None:
        reductions.done(hint.part)


def _numbers(given: Batch, run: Batch) -> list[int]:
    """The number in the given batch of each microbatch that is run."""
    everything = list(range(len(given)))
    return everything if len(run) == len(given) else [m for m in everything if given.microbatches[m].is_useful]


def _find_dtype(module: PipelineModule, mesh: PipelineMesh, stage_rank: Sequence[int]) -> torch.dtype:
    """The type of the LLM's weights, also on ranks that have none of them. Collective over the pipeline."""
    own = next(module.llm.parameters(), None)
    found = [None if own is None else own.dtype]
    if mesh.pp_size > 1:
        first = mesh.pp_ranks[stage_rank[0]]
        dist.broadcast_object_list(found, first, group=mesh.pp_group, device=mesh.device)
    assert found[0] is not None
    return found[0]
