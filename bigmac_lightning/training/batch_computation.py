"""One batch of a PipelineModule, as the executor sees it: whose rows are whose, and what each action computes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from bigmac_lightning.contracts.batch import Batch, MediaItem, Microbatch, TargetItem
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.contracts.outputs import Mode
from bigmac_lightning.contracts.precision import widened
from bigmac_lightning.contracts.slices import MicrobatchSlice, with_slices
from bigmac_lightning.runtime.computation import Outcome
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.runtime.peers import Peers, row_indices
from bigmac_lightning.runtime.routing import Item, Routing
from bigmac_lightning.schedule.action import Action
from bigmac_lightning.training.hidden_messages import HiddenMessages
from bigmac_lightning.training.nonfinite import Record
from bigmac_lightning.training.planner import PlannedBatch
from bigmac_lightning.training.sharding import Sharding, Together, nothing_of

AnyItem = TypeVar("AnyItem", MediaItem, TargetItem)


class BatchComputation:
    """The executor's `Computation` for a batch."""

    def __init__(
        self,
        module: PipelineModule,
        stages: Sequence[range],
        mesh: PipelineMesh,
        dtype: torch.dtype,
        contexts: Sequence[Callable[[], AbstractContextManager[object]]],
        seed: Callable[..., None],
        batch: Batch,
        planned: PlannedBatch,
        mode: Mode,
        scales: Tensor,
        sharding: Sharding,
        record: Record | None = None,
    ) -> None:
        """
        Args:
            stages: layers of each stage.
            mesh: tells which rank this is, and its peers.
            dtype: type of hidden states, features and conditions.
            contexts: context managers that every forward runs in.
            seed: lets random numbers depend on its arguments alone, so that plans do not change what actions draw.
            batch: a batch of useful microbatches only.
            scales: factors of the loss sums, in the order of `PipelineModule.loss_names`.
            sharding: tells which components all ranks run together.
            record: notes what the actions make; ``None``: nothing does.
        """
        self._record, self._seed = record, seed
        self.module, self.stages, self.batch, self.scales = module, stages, batch, scales
        self.mesh, self.rank = mesh, mesh.pp_rank
        self._peers = Peers(mesh) if mesh.peers > 1 else None
        if mesh.cp_size > 1 and batch.slices is None:
            batch = with_slices(batch, mesh.cp_rank, mesh.cp_size)
        self._given = batch.slices or batch.microbatches
        self.mode: Mode = mode
        self.width, self.dtype, self._contexts = module.llm.width, dtype, contexts
        self._messages = HiddenMessages(module, stages, dtype)
        microbatches = batch.microbatches
        media, targets = [mb.media for mb in microbatches], [mb.targets for mb in microbatches]
        self.features = _routing(media, module.feature_rows, planned, "EF")
        self.conditions = _routing(targets, lambda item: item.rows, planned, "G")
        self._recomputes = planned.recomputes
        self._sharding, self._together = sharding, Together(sharding.calls, mesh.device)
        # If pipelines gather the LLM's weights together, the graphs of their microbatches must pass the same blocks.
        self._alike, self._trains_encoders = mode == "train" and sharding.meets("llm"), planned.needs.encoder
        self.sums = torch.zeros_like(scales)
        self.predictions: dict[int, Tensor] = {}
        self.samples: dict[tuple[int, int], Tensor] = {}

    def work(self, action: Action) -> tuple[int, float]:
        """The number of items that this process works on in an action, and the sum of their costs."""
        if action.stage is not None:
            return 1, self.batch.microbatches[action.index].cost
        place = (self.rank, action.piece)
        if action.kind == "G":
            of = [self.batch.microbatches[m].targets[i] for m, i in self.conditions.items(action.index, place)]
        else:
            of = [self.batch.microbatches[m].media[i] for m, i in self.features.items(action.index, place)]
        own = [item.cost for item in of if item.peer == self.mesh.peer]
        return len(own), sum(own)

    def hidden_shape(self, microbatch: int, stage: int) -> tuple[int, ...]:
        return self._messages.shape(self._given[microbatch], stage)

    def _meeting_encoders(self, group: int) -> set[str]:
        """The encoders that all ranks run together in a group's EF."""
        known = {item.encoder for m in self.features.groups[group] for item in self.batch.microbatches[m].media}
        return {name for name in known if self._sharding.meets(f"encoders.{name}")}

    def _meeting_generators(self, group: int) -> set[str]:
        known = {item.generator for m in self.conditions.groups[group] for item in self.batch.microbatches[m].targets}
        return {name for name in known if self._sharding.meets(f"generators.{name}")}

    def start_gathering(self, kind: str, group: int) -> None:
        """Start to gather weights for the first component that a group's action of a kind runs."""
        backward = kind == "EB" and not self._recomputes
        if kind == "G":
            names, components, prefix = self._meeting_generators(group), self.module.generators, "generators"
        else:
            names, components, prefix = self._meeting_encoders(group), self.module.encoders, "encoders"
        order = [name for name in components if name in names]
        if backward:  # the one that ran last comes first, if it has a backward
            order = [n for n in reversed(order) if any(p.requires_grad for p in components[n].parameters())]
        if order:
            self._sharding.start_gathering(f"{prefix}.{order[0]}", backward)

    def encode(self, group: int, piece: int) -> Tensor:
        places = self.features.items(group, (self.rank, piece))
        items = [self.batch.microbatches[m].media[i] for m, i in places]
        names = self._meeting_encoders(group)
        if not items and not names:
            return self._no_rows()
        mine = [item.peer == self.mesh.peer for item in items]
        own = [item for item, is_mine in zip(items, mine, strict=True) if is_mine]
        self._seed("encoder", group, piece)
        with self._forward_context():
            encoded = self.module.encode(own, names, self._together.encode)
            if self._record is not None:
                of_own = [place for place, is_mine in zip(places, mine, strict=True) if is_mine]
                self._record.encoded(own, of_own, encoded)
            features = torch.cat(encoded) if encoded else self._no_rows()
        if self._peers is None:
            return features
        rows = [self.module.feature_rows(item) for item in items]
        indices = row_indices(rows, mine, features.device)
        return self._peers.joined(features.to(self.dtype), indices, sum(rows))

    def _no_rows(self) -> Tensor:
        return torch.zeros(0, self.width, dtype=self.dtype, device=self.sums.device)

    def forward(self, stage: int, microbatch: int, hidden: Tensor | None, features: Tensor | None) -> Outcome:
        layers, extras = self.stages[stage], {}
        if self._alike and stage == 0 and features is None:
            features = self._no_rows().requires_grad_(self._trains_encoders)
        if hidden is not None:
            if self._record is not None:
                self._record.follow_input(stage, microbatch, self._given[microbatch], hidden)
            hidden, extras = self._messages.unpack(hidden, self._given[microbatch], stage)
        elif self._record is not None:
            self._record.follow_input(stage, microbatch, self._given[microbatch], features)
        given = self._given[microbatch]
        self._seed("llm", stage, microbatch)
        with self._forward_context():
            out = self.module.run_stage(given, layers, hidden, extras, features, self.mode)
        if self._record is not None:
            self._record.hidden(stage, microbatch, given, out.last if out.hidden is None else out.hidden)
            for name, loss in out.losses.items():
                self._record.loss(name, microbatch, loss)
        if out.predictions is not None:
            self.predictions[microbatch] = _in_whole(given, out.predictions)
        losses = self._scaled(out.losses)
        if self._alike and out.last is not None and not losses:
            losses.append(nothing_of(out.last))
        loss = torch.stack(losses).sum() if losses else None
        conditions = out.conditions
        if conditions is not None and isinstance(given, MicrobatchSlice):
            conditions = given.in_whole(conditions)
        conditions = None if conditions is None else conditions.to(self.dtype)
        message = None if out.hidden is None else self._messages.pack(out, given, stage + 1)
        return Outcome(message, loss if loss is not None and loss.requires_grad else None, conditions)

    def generate(self, group: int, piece: int, conditions: Tensor) -> Tensor | None:
        places = self.conditions.items(group, (self.rank, piece))
        items: list[TargetItem] = [self.batch.microbatches[m].targets[i] for m, i in places]
        names = self._meeting_generators(group)
        if not items and not names:
            return None
        lengths, mine = [item.rows for item in items], [item.peer == self.mesh.peer for item in items]
        needed, nothing = conditions.requires_grad, None
        if self._peers is not None:
            conditions = self._peers.selected(conditions, row_indices(lengths, mine, conditions.device))
            nothing = nothing_of(conditions)  # all peers take part in its backward, also those without items
            own = [i for i, is_mine in enumerate(mine) if is_mine]
            places, items, lengths = [places[i] for i in own], [items[i] for i in own], [lengths[i] for i in own]
        if self._record is not None:
            self._record.follow_conditions(items, places, conditions)
        rows = list(conditions.split(lengths)) if items else []
        self._seed("generator", group, piece)
        with self._forward_context():
            if self.mode == "sample":
                made = self.module.sample(rows, items, names, self._together.sample)
                self.samples.update(zip(places, made, strict=True))
                return None
            together = partial(self._together.generate, through=needed)
            sums = self.module.generate(rows, items, names, together)
            if self._record is not None:
                self._record.generated(sums, items, places)
        losses = self._scaled(sums) + ([] if nothing is None else [nothing])
        return torch.stack(losses).sum()

    def _scaled(self, sums: dict[str, Tensor]) -> list[Tensor]:
        """The scaled losses, from which the backward starts; the loss sums are added up for the metrics."""
        losses: list[Tensor] = []
        for name, loss in sums.items():
            index = self.module.loss_names.index(name)
            if self._counts(name):
                self.sums[index] += loss.detach()
            losses.append(widened(loss) * self.scales[index])
        return losses

    def _counts(self, name: str) -> bool:
        """Whether this process adds a loss to the metrics. Tensor peers have the same losses of the LLM; context peers
        have parts of the text loss, and the same auxiliary losses. Generators have losses of own items."""
        if name in self.module.generators:
            return True
        return self.mesh.tp_rank == 0 and (name == "text" or self.mesh.cp_rank == 0)

    @contextmanager
    def _forward_context(self) -> Iterator[None]:
        with ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context())
            yield


def _in_whole(given: Microbatch, predictions: Tensor) -> Tensor:
    """The predictions of a whole microbatch, of which those of other slices are zero."""
    if not isinstance(given, MicrobatchSlice):
        return predictions
    return predictions.new_zeros(given.whole_labels).index_copy(0, given.label_rows, predictions)


def _routing(
    items: Sequence[Sequence[AnyItem]], rows: Callable[[AnyItem], int], planned: PlannedBatch, kind: str
) -> Routing:
    known = [[Item(item.owner, rows(item), item.cost) for item in row] for row in items]
    return Routing(known, planned.groups, planned.pieces[kind])
