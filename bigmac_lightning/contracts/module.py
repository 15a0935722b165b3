"""The LightningModule contract: components, and one `pipeline(batch)` over them.

Here stands what every path shares (how a microbatch goes through a stage, what is counted, how sums become losses) and
the plain path: one process, one autograd graph, any Lightning strategy. Under strategy="bigmac" the strategy hands in a
runner, and the same functions are called from the pipeline instead. Knows nothing of ranks, schedules or groups.

Shape suffixes: B samples, S tokens, D width of the LLM, L labelled positions, N rows of features or conditions,
V vocabulary.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, Self

import torch
from torch import Tensor, nn

from bigmac_lightning.contracts.batch import Batch, MediaData, MediaItem, Microbatch, TargetItem
from bigmac_lightning.contracts.components import Encoder, Generator, LanguageModel, trained_share
from bigmac_lightning.contracts.precision import converted
from bigmac_lightning.contracts.resumable import ResumableModule
from bigmac_lightning.contracts.token_loss import token_loss
from bigmac_lightning.estimates.partition import TrainedLayers

Mode = Literal["train", "evaluate", "sample"]


@dataclass
class PipelineOutput:
    """What `pipeline(batch)` returns, equal on every rank of a pipeline.

    Attributes:
        loss: scalar, the weighted loss over the whole step: in training of all data-parallel replicas, in evaluation,
            where they may have different numbers of batches, of this one. Return it from training_step.
        metrics: detached scalars ready for `log_dict`: "loss", and each part by name ("text", each generator).
        predictions: (sum of L,) most likely token at each labelled position, in the order of `batch.labels`;
            ``None`` while training.
        samples: one tensor per item of `batch.targets` in mode "sample", float32; else ``None``.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    predictions: Tensor | None = None
    samples: list[Tensor] | None = None


@dataclass
class StageOutput:
    """What one stage makes of one microbatch.

    Attributes:
        hidden: h_BSD for the next stage; ``None`` after the last.
        extras: what goes on to the next stage besides.
        losses: sum of the token losses as "text" if there are labels, and auxiliary losses (last stage).
        conditions: condition_ND rows of all generator targets (last stage; ``None`` if there are none).
        predictions: (L,) token ids (last stage, not while training).
    """

    hidden: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    conditions: Tensor | None = None
    predictions: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """The part of the LLM that a process holds.

    Attributes:
        layers: global indices of its layers; ``None``: all.
        embedding, head: whether it holds the input embedding, and the final norm with the output weight.
    """

    layers: Collection[int] | None = None
    embedding: bool = True
    head: bool = True


class Runner(Protocol):
    """Runs a module in a pipeline."""

    def __call__(self, batch: Batch, mode: Mode) -> PipelineOutput:
        """See `PipelineModule.pipeline`."""
        ...

    def gradient_norm(self) -> Tensor:
        """See `PipelineModule.gradient_norm`."""
        ...


class PipelineModule(ResumableModule):
    """Base class of everything that strategy="bigmac" can train.

    Set `encoders`, `llm` and `generators` in ``__init__`` and write ordinary steps around ``self.pipeline(batch)``::

        def training_step(self, batch, batch_idx):
            out = self.pipeline(batch)
            self.log_dict(out.metrics)
            return out.loss

    Attributes:
        encoders: by the name that `MediaItem.encoder` gives.
        llm: the language model.
        generators: by the name that `TargetItem.generator` gives.
        loss_weights: weight of "text", of auxiliary losses and of each generator's loss; where not named, 1.0 and what
            the language model says of its own.
        part: the part of the LLM to hold; set by the strategy before `configure_model`.
        runner: runs a batch through the pipeline; set by the strategy. ``None``: the plain path.
        last_metrics: of the last batch that `pipeline` has run.
    """

    def __init__(
        self,
        llm: LanguageModel,
        encoders: dict[str, Encoder] | None = None,
        generators: dict[str, Generator] | None = None,
        loss_weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        _check_components(llm, encoders or {}, generators or {})
        self.llm = llm
        self.encoders = nn.ModuleDict(dict(encoders or {}))
        self.generators = nn.ModuleDict(dict(generators or {}))
        self.loss_weights = {**llm.auxiliary_losses, **(loss_weights or {})}
        if unknown := self.loss_weights.keys() - self.loss_names:
            raise ValueError(f"loss_weights names {sorted(unknown)}, but the losses are {self.loss_names}")
        self.part = Part()
        self.runner: Runner | None = None
        self.last_metrics: dict[str, Tensor] = {}
        self._materialized = False
        self._trained_layers: TrainedLayers | None = None

    @property
    def sum_dtype(self) -> torch.dtype:
        """What losses are summed up in; the same on all ranks."""
        return torch.float64 if torch.float64 in (self.dtype, self.llm.dtype) else torch.float32

    @property
    def loss_names(self) -> list[str]:
        """The order in which loss sums and counts travel."""
        return ["text", *self.llm.auxiliary_losses, *self.generators]

    @property
    def tied_copies(self) -> dict[str, str]:
        return {f"llm.{copy}": f"llm.{original}" for copy, original in self.llm.tied.items()}

    def configure_model(self) -> None:
        """Give weights to this process's part of the LLM (a Lightning hook, called once the ranks are known)."""
        super().configure_model()
        if not self._materialized:
            frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
            self.materialize()
            for name, parameter in self.named_parameters():
                if name in frozen:  # by whoever had the module before it got its weights
                    parameter.requires_grad_(False)
            self.adapt()
            self._materialized = True

    def materialize(self) -> None:
        """Give weights to the components, to the LLM those of this process's part."""
        for component in [*self.encoders.values(), *self.generators.values()]:
            assert isinstance(component, Encoder | Generator)
            component.materialize()
        layers = range(self.llm.num_layers) if self.part.layers is None else self.part.layers
        self.llm.materialize(layers, self.part.embedding, self.part.head)

    def adapt(self) -> None:
        """Change the components once they have their weights: freeze parts, add adapters. Works on the meta device,
        too, but `configure_model` cannot come after it."""

    @property
    def trained_layers(self) -> TrainedLayers:
        """What of the LLM is trained, as it was known before any weights were there."""
        if self._trained_layers is None:
            self._trained_layers = self._find_trained_layers()
        return self._trained_layers

    def _find_trained_layers(self) -> TrainedLayers:
        llm, layers = self.llm, range(self.llm.num_layers)
        parts = [((), True, False), *(((k,), False, False) for k in layers), ((), False, True)]
        shares = tuple(trained_share(llm.parameters_of(*part)) for part in parts)
        below = any(parameter.requires_grad for parameter in self.encoders.parameters())
        return TrainedLayers(shares, below, llm.gradient_checkpointing)

    def cpu(self) -> Self:
        """As of every module; called by Lightning's teardown even where an error came before `configure_model`, which
        must not hide behind another about weights that are not there yet."""
        return self if any(parameter.is_meta for parameter in self.parameters()) else super().cpu()

    def pipeline(self, batch: Batch, sample: bool = False) -> PipelineOutput:
        """Run a batch through encoders, LLM and generators.

        Trains (gradients included, under strategy="bigmac") inside a training step and evaluates elsewhere.

        Args:
            batch: as a DataModule's collate function made it.
            sample: let the generators make things instead of computing their loss.
        """
        learning = self.training or (self._trainer is not None and self._trainer.training)  # a frozen model is in eval
        mode: Mode = "sample" if sample else "train" if learning and torch.is_grad_enabled() else "evaluate"
        run = self.runner or self._run_plain
        if isinstance(batch, Batch):  # others are refused
            batch = self.prepare(batch)
        out = run(batch, mode)
        self.last_metrics = out.metrics
        return out

    def gradient_norm(self) -> Tensor:
        """2-norm of all gradients of the model, each parameter counted once; the same scalar on every rank.

        For hooks between the backward and the optimizer's step, such as `on_before_optimizer_step`; all ranks call it.
        Norms over ``self.parameters()`` see one rank's part of the model under strategy="bigmac".
        """
        if self.runner is not None:
            return self.runner.gradient_norm()
        return nn.utils.get_total_norm(
            [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        )

    def prepare(self, batch: Batch) -> Batch:
        """A batch with everything in its inputs that the LLM needs. `pipeline` does this; a collate function may do it
        before, on the CPU."""
        return batch.replace(microbatches=[replace(m, inputs=self.llm.prepare(m.inputs)) for m in batch.microbatches])

    # -- shared by the plain path and the pipeline ---------------------------------------------------------------

    def encode(self, items: Sequence[MediaItem]) -> list[Tensor]:
        """features_ND of each item; items of one encoder are encoded together."""
        features: list[Tensor | None] = [None] * len(items)
        for name, encoder in self.encoders.items():
            assert isinstance(encoder, Encoder)
            mine = [i for i, item in enumerate(items) if item.encoder == name]
            if mine:
                dtype, expected = encoder.input_dtype(), [self.feature_rows(items[i]) for i in mine]
                encoded = encoder([_data(converted(items[i], dtype)) for i in mine])
                if encoded.shape != (sum(expected), self.llm.width):
                    raise ValueError(
                        f"encoder {name!r} made features of shape {tuple(encoded.shape)} of items with {expected} "
                        f"rows, but they must be of shape ({sum(expected)}, {self.llm.width}): the DataModule's "
                        "MediaItem.rows must say how many rows an item makes, and their width is that of the LLM"
                    )
                for i, row in zip(mine, encoded.split(expected), strict=True):
                    features[i] = row
        for item, feature in zip(items, features, strict=True):
            if feature is None:
                raise ValueError(f"a media item names encoder {item.encoder!r}; the model has {list(self.encoders)}")
        return [feature for feature in features if feature is not None]

    def levels(self, items: Sequence[MediaItem]) -> int:
        """The most feature levels that any of the items' encoders gives."""
        return max((self._levels(item) for item in items), default=1)

    def feature_rows(self, item: MediaItem) -> int:
        """Feature rows of an item, all levels together."""
        return item.rows * self._levels(item)

    def _levels(self, item: MediaItem) -> int:
        if item.encoder not in self.encoders:
            return 1
        encoder = self.encoders[item.encoder]
        assert isinstance(encoder, Encoder)
        return encoder.levels

    def extra_shapes(self, microbatch: Microbatch, layer: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what goes with a microbatch's hidden states into a layer."""
        return self.llm.extra_shapes(layer, len(microbatch.media_positions), self.levels(microbatch.media))

    def run_stage(
        self,
        microbatch: Microbatch,
        layers: range,
        hidden: Tensor | None,
        extras: dict[str, Tensor],
        features: Tensor | None,
        mode: Mode,
    ) -> StageOutput:
        """One stage on one microbatch.

        Args:
            layers: this stage's layers; the first stage embeds, the last one computes loss and conditions.
            hidden: h_BSD from the stage before; ``None`` for the first.
            extras: what came with them.
            features: rows of all the microbatch's media items (first stage); ``None`` if it has none.
        """
        llm, extras = self.llm, dict(extras)
        if layers.start == 0:
            hidden = llm.embed(microbatch.inputs)
            if features is not None:
                features, extras = self._by_level(microbatch.media, features)
                flat = hidden.flatten(0, 1).index_copy(0, microbatch.media_positions, features.to(hidden.dtype))
                hidden = flat.view_as(hidden)
        assert hidden is not None, "only the first stage starts without hidden states"
        inputs = {**microbatch.inputs, "media_positions": microbatch.media_positions}
        hidden = llm.run_layers(hidden, inputs, layers, extras)
        if layers.stop < llm.num_layers:
            return StageOutput(hidden=hidden, extras=extras)
        out = StageOutput()
        if microbatch.is_useful:
            out.losses = llm.auxiliary(extras)
        flat = hidden.flatten(0, 1)
        if len(microbatch.labels):
            h_LD, labels = flat[microbatch.label_positions], microbatch.labels
            fused = llm.fused_loss(h_LD, labels) if mode == "train" else None
            if fused is None:
                out.losses["text"], out.predictions = token_loss(
                    llm.logits, h_LD, labels, llm.vocabulary, predict=mode != "train"
                )
            else:
                out.losses["text"] = fused
        if microbatch.targets:
            out.conditions = flat[microbatch.target_positions]
        return out

    def _by_level(self, items: Sequence[MediaItem], features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features for the embedding, and as extras those of deeper levels, zero where an encoder has fewer."""
        levels = self.levels(items)
        if levels == 1:
            return features, {}
        rows = features.split([self.feature_rows(item) for item in items])
        stacked = [row.unflatten(0, (self._levels(item), item.rows)) for row, item in zip(rows, items, strict=True)]
        padded = [nn.functional.pad(level, (0, 0, 0, 0, 0, levels - len(level))) for level in stacked]
        joined = torch.cat(padded, dim=1)
        return joined[0], {"features": joined[1:]}

    def generate(self, conditions: list[Tensor], items: Sequence[TargetItem]) -> dict[str, Tensor]:
        """Loss sum of each generator that has items."""
        sums: dict[str, Tensor] = {}
        for name, generator in self.generators.items():
            mine = [i for i, item in enumerate(items) if item.generator == name]
            if mine:
                sums[name] = generator(*self._generator_inputs(generator, conditions, items, mine))
        return sums

    def sample(self, conditions: list[Tensor], items: Sequence[TargetItem]) -> list[Tensor]:
        """One made thing per item, float32."""
        made: list[Tensor | None] = [None] * len(items)
        for name, generator in self.generators.items():
            mine = [i for i, item in enumerate(items) if item.generator == name]
            if mine:
                assert isinstance(generator, Generator)
                results = generator.sample(*self._generator_inputs(generator, conditions, items, mine))
                for i, result in zip(mine, results, strict=True):
                    made[i] = result.float()
        return [thing for thing in made if thing is not None]

    @staticmethod
    def _generator_inputs(
        generator: nn.Module, conditions: list[Tensor], items: Sequence[TargetItem], mine: list[int]
    ) -> tuple[list[Tensor], list[TargetItem]]:
        assert isinstance(generator, Generator)
        dtype = generator.input_dtype()
        given = [conditions[i] if dtype is None else conditions[i].to(dtype) for i in mine]
        return given, [converted(items[i], dtype) for i in mine]

    def counts(self, batch: Batch) -> list[float]:
        """What each loss sum of `loss_names` is divided by: labelled tokens, microbatches, targets."""
        useful = float(sum(microbatch.is_useful for microbatch in batch.microbatches))
        tokens = sum(len(microbatch.labels) for microbatch in batch.microbatches)
        targets = [item.generator for item in batch.targets]
        auxiliary = [useful] * len(self.llm.auxiliary_losses)
        return [float(tokens), *auxiliary, *(float(targets.count(name)) for name in self.generators)]

    def scales(self, counts: Tensor) -> Tensor:
        """Factor of each loss sum: weight / count over the whole step (count 0 gives a harmless weight / 1)."""
        return counts.new_tensor([self.loss_weights.get(name, 1.0) for name in self.loss_names]) / counts.clamp(min=1.0)

    def metrics(self, sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Named scalars from the step's loss sums and counts."""
        parts = sums / counts.clamp(min=1.0)
        return {"loss": (sums * self.scales(counts)).sum(), **dict(zip(self.loss_names, parts.unbind(), strict=True))}

    # -- the plain path --------------------------------------------------------------------------------------------

    def _run_plain(self, batch: Batch, mode: Mode) -> PipelineOutput:
        sums = dict.fromkeys(self.loss_names, torch.zeros((), dtype=self.sum_dtype, device=self.device))
        predictions: list[Tensor] = []
        samples: list[Tensor] = []
        for microbatch in batch.microbatches:
            features = torch.cat(self.encode(microbatch.media)) if microbatch.media else None
            out = self.run_stage(microbatch, range(self.llm.num_layers), None, {}, features, mode)
            for name, loss in out.losses.items():
                sums[name] = sums[name] + loss
            if out.predictions is not None:
                predictions.append(out.predictions)
            if out.conditions is None:
                continue
            conditions = list(out.conditions.split([item.rows for item in microbatch.targets]))
            if mode == "sample":
                samples += self.sample(conditions, microbatch.targets)
            else:
                for name, loss in self.generate(conditions, microbatch.targets).items():
                    sums[name] = sums[name] + loss
        local = torch.stack([sums[name].to(self.sum_dtype) for name in self.loss_names])
        counts, total = torch.tensor(self.counts(batch), dtype=self.sum_dtype, device=self.device), local.detach()
        world = 1
        if mode == "train" and self._trainer is not None and self._trainer.world_size > 1:
            counts, total = self._over_replicas(counts, total)
            # data-parallel strategies average gradients over their world: undo that, the counts are global already
            world = self._trainer.world_size
        loss = (local * self.scales(counts)).sum() * world
        if mode == "train" and not loss.requires_grad:
            loss.requires_grad_()  # a batch without anything to learn from: its backward does nothing
        return PipelineOutput(
            loss=loss,
            metrics=self.metrics(total, counts),
            predictions=None if mode == "train" else torch.cat([batch.labels.new_empty(0), *predictions]),
            samples=samples if mode == "sample" else None,
        )

    def _over_replicas(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        assert self._trainer is not None
        reduced = self._trainer.strategy.reduce(torch.stack(tensors), reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced.unbind()


def _check_components(llm: LanguageModel, encoders: Mapping[str, Encoder], generators: Mapping[str, Generator]) -> None:
    """
    Raises:
        TypeError: a component of another kind.
        ValueError: a component of another width than the LLM's.
    """
    named = [("llm", llm, LanguageModel)]
    named += [(f"encoders[{name!r}]", encoder, Encoder) for name, encoder in encoders.items()]
    named += [(f"generators[{name!r}]", generator, Generator) for name, generator in generators.items()]
    for name, component, kind in named:
        if not isinstance(component, kind):
            raise TypeError(
                f"{name} must be a bigmac_lightning.{kind.__name__}, but it is a {type(component).__name__}"
            )
        if component.width and component.width != llm.width:
            raise ValueError(f"{name} has the width {component.width}, but the LLM has {llm.width}: they must be equal")


def _data(item: MediaItem) -> MediaData:
    if item.data is None:
        raise ValueError(f"a media item of encoder {item.encoder!r} has no data on its owner, rank {item.owner}")
    return item.data
