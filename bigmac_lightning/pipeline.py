"""Runs a PipelineModule's batches through the runtime: a plan per batch, one result on all ranks.

Between module.py (what a model does) and runtime/ (how a plan is executed). Knows process groups through the mesh only;
knows nothing of Lightning's Trainer.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigmac_lightning.batch import Batch, MediaItem, TargetItem
from bigmac_lightning.exact import apart, parts_of, together
from bigmac_lightning.module import Mode, Part, PipelineModule, PipelineOutput, StageOutput
from bigmac_lightning.options import PipelineOptions
from bigmac_lightning.partition import LayerCosts, make_stages
from bigmac_lightning.planning import PlannedBatch, Planner, Trained
from bigmac_lightning.runtime.executor import Executor, Outcome
from bigmac_lightning.runtime.gradients import ParameterPlaces
from bigmac_lightning.runtime.lowering import Needs
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.runtime.routing import Item, Routing
from bigmac_lightning.schedule.plan import Plan

AnyItem = TypeVar("AnyItem", MediaItem, TargetItem)


def split_layers(layers: int, stages: int) -> list[range]:
    """Consecutive, nearly even stages; see `make_stages`."""
    return make_stages(LayerCosts((1.0,) * layers), stages)


def part_of(rank: int, stages: Sequence[range], stage_rank: Sequence[int]) -> Part:
    """What a pipeline rank holds of the LLM."""
    own = [s for s, owner in enumerate(stage_rank) if owner == rank]
    return Part(
        layers=tuple(layer for s in own for layer in stages[s]),
        embedding=0 in own,
        head=len(stages) - 1 in own,
    )


def settled(module: PipelineModule, options: PipelineOptions, size: int) -> tuple[PipelineOptions, list[range], str]:
    """Options with all that is open named, the layers of each stage, and why; the same on all ranks.

    Args:
        module: before or after its weights are there.
        size: ranks of the pipeline, P.

    Raises:
        ValueError: it cannot be cut into so many stages, or no plan is possible.
    """
    layers = module.llm.num_layers
    options, reason = options.chosen(size, layers, bool(module.encoders), bool(module.generators))
    costs = module.llm.costs(options.sample_tokens)
    stages = make_stages(module.trained_layers.step(costs), len(options.stage_rank(size)), options.partition)
    options = replace(options, partition=tuple(len(stage) for stage in stages))
    return options.estimated(costs, stages), stages, reason


class PipelineRunner:
    """A PipelineModule on one rank of a pipeline. Calling it runs a batch; training leaves summed gradients of this
    rank's work in ``.grad`` (reduce them with `runtime.gradients`, using `places`).

    Args:
        module: with this rank's part of the LLM materialised.
        forward_context: entered around every forward (precision).
    """

    def __init__(
        self,
        module: PipelineModule,
        mesh: PipelineMesh,
        options: PipelineOptions,
        forward_context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.module, self.mesh, self.options, self.forward_context = module, mesh, options, forward_context
        self.stage_rank = tuple(options.stage_rank(mesh.pp_size))
        self.stages = make_stages(module.llm.costs(), len(self.stage_rank), options.partition)
        self.layout = options.layout(mesh.pp_size, mesh.pp_rank)
        self.executor = Executor(mesh, self.stage_rank)
        self.dtype = self._find_dtype()
        self.last_plan: Plan | None = None
        self.last_metrics: dict[str, Tensor] = {}
        self.gradient_scale: Tensor | float = 1.0
        nothing = Trained.nothing(len(self.stages))
        self.planner = self.evaluation_planner = Planner(options, mesh.pp_size, mesh.pp_rank, nothing)
        self.refresh()

    def refresh(self) -> None:
        """Look again at what is trained: after parameters were frozen or unfrozen. Collective over the pipeline."""
        trained = self._find_trained()
        if trained != self.planner.trained:
            self.planner = Planner(self.options, self.mesh.pp_size, self.mesh.pp_rank, trained)
        self.places = self._find_places()
        self.llm_weights = [parameter for parameter in self.module.llm.parameters() if parameter.requires_grad]

    # -- one batch ---------------------------------------------------------------------------------------------------

    def __call__(self, batch: Batch, mode: Mode) -> PipelineOutput:
        """Run a batch; see `PipelineModule.pipeline`. Collective: every rank passes its replica's batch."""
        self.check(batch, mode)
        module, device = self.module, self.mesh.device
        counts = torch.tensor(module.counts(batch), device=device)
        if self.mesh.dp_size > 1:
            dist.all_reduce(counts, group=self.mesh.dp_group)
        planner, planned = self.planner if mode == "train" else self.evaluation_planner, batch.planned
        batch = batch.useful()
        sums = torch.zeros_like(counts)
        predictions: dict[int, Tensor] = {}
        samples: dict[tuple[int, int], Tensor] = {}
        if batch.microbatches:
            if not isinstance(planned, PlannedBatch) or planned.key != planner.key(batch):
                planned = planner(batch)
            work = BatchWork(self, batch, planned.plan, mode, module.scales(counts) * self.gradient_scale)
            self.executor.run(planned.program, work, planner.trained.needs, planned.plan.recomputes)
            self.last_plan = planned.plan
            sums, predictions, samples = work.sums, work.predictions, work.samples
        if self.mesh.pp_size * self.mesh.dp_size > 1:
            dist.all_reduce(sums)
        metrics = self.last_metrics = module.metrics(sums, counts)
        return PipelineOutput(
            loss=metrics["loss"],
            metrics=metrics,
            predictions=None if mode == "train" else self._share_predictions(batch, predictions),
            samples=self._share_samples(batch, samples) if mode == "sample" else None,
        )

    def check(self, batch: Batch, mode: Mode) -> None:
        """Refuse a batch that does not fit, by what all ranks see: all of them refuse it.

        Raises:
            TypeError, ValueError: naming the microbatch and what to change.
        """
        if not isinstance(batch, Batch):
            raise TypeError(
                f"the pipeline got a {type(batch).__name__}; a DataModule for strategy='bigmac' "
                "must collate samples to a bigmac_lightning.Batch"
            )
        made_for = replace(batch.layout, rank=self.layout.rank, microbatches=self.layout.microbatches)
        if made_for != self.layout:
            raise ValueError(
                f"the DataModule made this batch for {batch.layout}, but the pipeline is {self.layout}: "
                "let its collate function use the layout of trainer.strategy.pipeline_layout"
            )
        if not batch.microbatches:
            raise ValueError("the batch has no microbatches")
        wanted = self.options.microbatches
        if mode == "train" and wanted is not None and len(batch) != wanted:
            raise ValueError(
                f"the strategy was given microbatches={wanted}, but the batch has {len(batch)}: change "
                "microbatches or the DataModule's batch size (a last, smaller batch: drop_last=True)"
            )
        for m, microbatch in enumerate(batch.microbatches):
            for what, items, positions, known in (
                ("media", microbatch.media, microbatch.media_positions, self.module.encoders),
                ("target", microbatch.targets, microbatch.target_positions, self.module.generators),
            ):
                if (rows := sum(item.rows for item in items)) != len(positions):
                    raise ValueError(f"microbatch {m}: {what} items have {rows} rows, but {len(positions)} positions")
                for item in items:
                    name = item.encoder if isinstance(item, MediaItem) else item.generator
                    if name not in known:
                        raise ValueError(f"microbatch {m}: no {what} component {name!r}; the model has {list(known)}")
                    if not 0 <= item.owner < self.mesh.pp_size:
                        raise ValueError(f"microbatch {m}: a {what} item has owner {item.owner}, not a pipeline rank")

    # -- what is trained ---------------------------------------------------------------------------------------------

    def _find_trained(self) -> Trained:
        module = self.module
        encoder = _trained(module.encoders)
        llm = _trained(module.llm)  # a rank's stages share one answer
        flags = torch.tensor(
            [llm and owner == self.mesh.pp_rank for owner in self.stage_rank],
            dtype=torch.int32,
            device=self.mesh.device,
        )
        if self.mesh.pp_size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.mesh.pp_group)
        trained = [bool(flag) for flag in flags.tolist()]
        needs = Needs(
            stages=tuple(encoder or any(trained[: s + 1]) for s in range(len(self.stages))),
            encoder=encoder,
            generator=_trained(module.generators),
        )
        return Trained(needs, tuple(trained), backward_share(module.encoders.values()))

    def _find_dtype(self) -> torch.dtype:
        """Of the LLM, also on ranks that hold nothing of it."""
        own = next(self.module.llm.parameters(), None)
        found = [None if own is None else own.dtype]
        if self.mesh.pp_size > 1:
            first = self.mesh.pp_ranks[self.stage_rank[0]]
            dist.broadcast_object_list(found, first, group=self.mesh.pp_group, device=self.mesh.device)
        assert found[0] is not None
        return found[0]

    def _find_places(self) -> ParameterPlaces:
        part = part_of(self.mesh.pp_rank, self.stages, self.stage_rank)
        tied_names = {name for pair in self.module.llm.tied.items() for name in pair}
        apart = part.embedding != part.head
        places = ParameterPlaces({}, {}, {})
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if not name.startswith("llm."):
                kind = places.replicated
            elif apart and name.removeprefix("llm.") in tied_names:
                kind = places.tied
            else:
                kind = places.stage
            assert isinstance(kind, dict)
            kind[name] = parameter
        return places

    # -- results for every rank ----------------------------------------------------------------------------------------

    def _share_predictions(self, batch: Batch, predictions: dict[int, Tensor]) -> Tensor:
        result = batch.labels.new_empty(len(batch.labels))
        if predictions:
            torch.cat([predictions[m] for m in sorted(predictions)], out=result)
        if self.mesh.pp_size > 1 and len(result):
            last = self.mesh.pp_ranks[self.stage_rank[-1]]
            dist.broadcast(result, last, group=self.mesh.pp_group)
        return result

    def _share_samples(self, batch: Batch, made: dict[tuple[int, int], Tensor]) -> list[Tensor]:
        places = [(m, i, item) for m, mb in enumerate(batch.microbatches) for i, item in enumerate(mb.targets)]
        results = []
        for m, i, item in places:
            sample = made[m, i].float() if (m, i) in made else torch.empty(item.shape, device=self.mesh.device)
            if self.mesh.pp_size > 1:
                sample = sample.contiguous()
                dist.broadcast(sample, self.mesh.pp_ranks[item.owner], group=self.mesh.pp_group)
            results.append(sample)
        return results


class BatchWork:
    """One batch of a PipelineModule, as the executor sees it."""

    def __init__(self, runner: PipelineRunner, batch: Batch, plan: Plan, mode: Mode, scales: Tensor) -> None:
        self.runner, self.module, self.batch, self.scales = runner, runner.module, batch, scales
        self.mode: Mode = mode
        self.rank = runner.mesh.pp_rank
        self.width = runner.module.llm.width
        self.dtype = runner.dtype
        microbatches = batch.microbatches
        media, targets = [mb.media for mb in microbatches], [mb.targets for mb in microbatches]
        self.features = _routing(media, runner.module.feature_rows, plan, "EF")
        self.conditions = _routing(targets, lambda item: item.rows, plan, "G")
        self.sums = torch.zeros(len(scales), device=scales.device)
        self.predictions: dict[int, Tensor] = {}
        self.samples: dict[tuple[int, int], Tensor] = {}

    def hidden_shape(self, microbatch: int, stage: int) -> tuple[int, ...]:
        shape, extras = self._shapes(microbatch, stage)
        return (shape.numel() + sum(self._sizes(extras)),) if extras else shape

    def _shapes(self, microbatch: int, stage: int) -> tuple[torch.Size, dict[str, torch.Size]]:
        """Of the hidden states, and of the extras, that go into a stage."""
        given = self.batch.microbatches[microbatch]
        extras = self.module.extra_shapes(given, self.runner.stages[stage].start)
        return torch.Size((*given.shape, self.width)), {name: torch.Size(shape) for name, shape in extras.items()}

    def _sizes(self, extras: dict[str, torch.Size]) -> list[int]:
        """Of each extra in a message."""
        exact = self.module.llm.exact_extras
        return [extra.numel() * (parts_of(self.dtype) if name in exact else 1) for name, extra in extras.items()]

    def _unpack(self, message: Tensor, microbatch: int, stage: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states and extras travel as one flat tensor where there are extras."""
        shape, extras = self._shapes(microbatch, stage)
        if not extras:
            return message, {}
        hidden, *others = message.split([shape.numel(), *self._sizes(extras)])
        exact, made = self.module.llm.exact_extras, dict[str, Tensor]()
        for (name, extra), part in zip(extras.items(), others, strict=True):
            made[name] = (together(part) if name in exact else part).view(extra)
        return hidden.view(shape), made

    def _pack(self, out: StageOutput, microbatch: int, stage: int) -> Tensor | None:
        if out.hidden is None:
            return None
        _, extras = self._shapes(microbatch, stage)
        assert extras.keys() == out.extras.keys(), (extras.keys(), out.extras.keys())
        if not extras:
            return out.hidden.to(self.dtype)
        exact, parts = self.module.llm.exact_extras, [out.hidden.to(self.dtype).flatten()]
        for name in extras:
            extra = out.extras[name]
            parts.append(apart(extra, self.dtype) if name in exact else extra.to(self.dtype).flatten())
        return torch.cat(parts)

    def encode(self, group: int, piece: int) -> Tensor:
        places = self.features.items(group, (self.rank, piece))
        items = [self.batch.microbatches[m].media[i] for m, i in places]
        with self.runner.forward_context():
            return torch.cat(self.module.encode(items))

    def forward(self, stage: int, microbatch: int, hidden: Tensor | None, features: Tensor | None) -> Outcome:
        layers, extras = self.runner.stages[stage], {}
        if hidden is not None:
            hidden, extras = self._unpack(hidden, microbatch, stage)
        given = self.batch.microbatches[microbatch]
        with self.runner.forward_context():
            out = self.module.run_stage(given, layers, hidden, extras, features, self.mode)
        if out.predictions is not None:
            self.predictions[microbatch] = out.predictions
        losses = self._scaled(out.losses)
        loss = torch.stack(losses).sum() if losses else None
        conditions = None if out.conditions is None else out.conditions.to(self.dtype)
        message = self._pack(out, microbatch, stage + 1)
        return Outcome(message, loss if loss is not None and loss.requires_grad else None, conditions)

    def generate(self, group: int, piece: int, conditions: Tensor) -> Tensor | None:
        places = self.conditions.items(group, (self.rank, piece))
        items: list[TargetItem] = [self.batch.microbatches[m].targets[i] for m, i in places]
        rows = list(conditions.split([item.rows for item in items]))
        with self.runner.forward_context():
            if self.mode == "sample":
                made = self.module.sample(rows, items)
                self.samples.update(zip(places, made, strict=True))
                return None
            sums = self.module.generate(rows, items)
        return torch.stack(self._scaled(sums)).sum()

    def _scaled(self, sums: dict[str, Tensor]) -> list[Tensor]:
        """What to run backward from; the sums are counted."""
        losses: list[Tensor] = []
        for name, loss in sums.items():
            index = self.module.loss_names.index(name)
            self.sums[index] += loss.detach()
            losses.append(loss.float() * self.scales[index])
        return losses

    def split_weights(self, stage: int) -> list[nn.Parameter]:
        return self.runner.llm_weights


def _routing(items: Sequence[Sequence[AnyItem]], rows: Callable[[AnyItem], int], plan: Plan, kind: str) -> Routing:
    known = [[Item(item.owner, rows(item), item.cost) for item in row] for row in items]
    return Routing(known, plan.groups, plan.pieces(kind))


def backward_share(encoders: Iterable[nn.Module]) -> float:
    """The share of the encoders' backward that reaches down to the first trained parameter, by parameters."""
    whole = needed = 0
    for encoder in encoders:
        reached = False
        for parameter in encoder.parameters():
            reached = reached or parameter.requires_grad
            whole += parameter.numel()
            needed += parameter.numel() if reached else 0
    return needed / whole if needed else 1.0


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
