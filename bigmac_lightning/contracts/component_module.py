"""A module's components, and what each kind of action computes with them: the same functions serve the plain path and
the pipeline.

Shape suffixes: B samples, S tokens, D width of the LLM, L labelled positions, N rows of features or conditions,
V vocabulary.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from bigmac_lightning.contracts.batch import Batch, MediaData, MediaItem, Microbatch, TargetItem
from bigmac_lightning.contracts.components import Encoder, Generator, LanguageModel
from bigmac_lightning.contracts.outputs import Mode, StageOutput
from bigmac_lightning.contracts.precision import converted
from bigmac_lightning.contracts.resumable import ResumableModule
from bigmac_lightning.contracts.slices import MicrobatchSlice
from bigmac_lightning.host import from_host

Result = TypeVar("Result")
EncoderCall = Callable[[Encoder, list[MediaData], list[int]], Tensor]
"""A function (encoder, data of each item, rows of each item) -> features_ND."""
GeneratorCall = Callable[[Generator, list[Tensor], list[TargetItem]], Result]
"""A function (generator, condition_ND of each item, items) -> the sum of losses, or samples."""


class ComponentModule(ResumableModule):
    """Encoders, an LLM and generators, applied to parts of a batch.

    Attributes:
        encoders, llm, generators, loss_weights: see `PipelineModule`.
    """

    def __init__(
        self,
        llm: LanguageModel,
        encoders: Mapping[str, Encoder],
        generators: Mapping[str, Generator],
        loss_weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        _check_components(llm, encoders, generators)
        self.llm = llm
        self.encoders = nn.ModuleDict(dict(encoders))
        self.generators = nn.ModuleDict(dict(generators))
        self.loss_weights = {**llm.auxiliary_losses, **(loss_weights or {})}
        if unknown := self.loss_weights.keys() - self.loss_names:
            raise ValueError(f"loss_weights names {sorted(unknown)}, but the losses are {self.loss_names}")

    @property
    def sum_dtype(self) -> torch.dtype:
        """The type of loss sums; the same on all ranks."""
        return torch.float64 if torch.float64 in (self.dtype, self.llm.dtype) else torch.float32

    @property
    def loss_names(self) -> list[str]:
        """The losses' names, in the order of `counts` and `scales`."""
        return ["text", *self.llm.auxiliary_losses, *self.generators]

    def encode(
        self, items: Sequence[MediaItem], names: Collection[str] = (), call: EncoderCall | None = None
    ) -> list[Tensor]:
        """features_ND of each item, in their order. Items of one encoder are encoded together.

        Args:
            names: encoders that run even if they have no items; the empty features that they give come last.
            call: runs an encoder of `names`.
        """
        features: list[Tensor | None] = [None] * len(items)
        empty: list[Tensor] = []
        for name, encoder in self.encoders.items():
            assert isinstance(encoder, Encoder)
            mine = [i for i, item in enumerate(items) if item.encoder == name]
            if mine or name in names:
                dtype, expected = encoder.input_dtype(), [self.feature_rows(items[i]) for i in mine]
                pixels = [_data(converted(items[i], dtype)) for i in mine]
                encoded = call(encoder, pixels, expected) if call is not None and name in names else encoder(pixels)
                if encoded.shape != (sum(expected), self.llm.width):
                    raise ValueError(
                        f"encoder {name!r} made features of shape {tuple(encoded.shape)} of items with {expected} "
                        f"rows, but they must be of shape ({sum(expected)}, {self.llm.width}): the DataModule's "
                        "MediaItem.rows must say how many rows an item makes, and their width is that of the LLM"
                    )
                empty += [] if mine else [encoded]
                for i, row in zip(mine, encoded.split(expected) if mine else (), strict=True):
                    features[i] = row
        for item, feature in zip(items, features, strict=True):
            if feature is None:
                raise ValueError(f"a media item names encoder {item.encoder!r}; the model has {list(self.encoders)}")
        return [*(feature for feature in features if feature is not None), *empty]

    def levels(self, items: Sequence[MediaItem]) -> int:
        """The largest number of feature levels of the items' encoders; 1 without items."""
        return max((self._levels(item) for item in items), default=1)

    def feature_rows(self, item: MediaItem) -> int:
        """Number of feature rows of an item, all levels together."""
        return item.rows * self._levels(item)

    def _levels(self, item: MediaItem) -> int:
        if item.encoder not in self.encoders:
            return 1
        encoder = self.encoders[item.encoder]
        assert isinstance(encoder, Encoder)
        return encoder.levels

    def extra_shapes(self, microbatch: Microbatch, layer: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the extras that go with a microbatch's hidden states into a layer."""
        media_rows, levels = len(self._media_positions(microbatch)), self.levels(microbatch.media)
        return self.llm.extra_shapes(layer, microbatch.shape, media_rows, levels)

    def _media_positions(self, microbatch: Microbatch) -> Tensor:
        """The tokens of the feature rows that a stage gets: of a slice its own, but all if layers attend to them."""
        if isinstance(microbatch, MicrobatchSlice) and self.llm.attends_to_features:
            return microbatch.whole_media_positions
        return microbatch.media_positions

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

        Of a slice of a microbatch, the text loss is the sum of its own tokens, and the conditions are its own rows. An
        auxiliary loss is that of the whole microbatch on every slice's rank, so it must be counted once; its gradients
        are those of the slice's own tokens.

        Args:
            layers: this stage's layers; the first stage embeds, the last one computes loss and conditions.
            hidden: h_BSD from the stage before; ``None`` for the first stage.
            extras: the extras that came with `hidden`.
            features: feature rows of all the microbatch's media items (first stage); ``None`` if it has none.
        """
        llm, extras = self.llm, dict(extras)
        if layers.start == 0:
            hidden = llm.embed(microbatch.inputs)
            if features is not None:
                features, extras = self._by_level(microbatch.media, features)
                if isinstance(microbatch, MicrobatchSlice) and not llm.attends_to_features:
                    # also with no rows of its own: gradients are then zeros
                    features = features[microbatch.feature_rows]
                    extras = {name: levels[:, microbatch.feature_rows] for name, levels in extras.items()}
                features, flat = features.to(hidden.dtype), hidden.flatten(0, 1)
                if llm.attends_to_features:
                    extras["features"] = features[None]
                else:
                    put = flat.index_add if llm.adds_features else flat.index_copy
                    hidden = put(0, microbatch.media_positions, features).view_as(hidden)
        assert hidden is not None, "only the first stage starts without hidden states"
        inputs = {**microbatch.inputs, "media_positions": self._media_positions(microbatch)}
        hidden = llm.run_layers(hidden, inputs, layers, extras)
        if layers.stop < llm.num_layers:
            return StageOutput(hidden=hidden, extras=extras)
        out = StageOutput(last=hidden)
        if microbatch.is_useful:
            out.losses = llm.auxiliary(extras)
        flat = hidden.flatten(0, 1)
        if microbatch.has_labels:
            h_LD, labels = flat[microbatch.label_positions], microbatch.labels
            fused = llm.fused_loss(h_LD, labels) if mode == "train" else None
            if fused is None:
                out.losses["text"], out.predictions = llm.text_loss(h_LD, labels, predict=mode != "train")
            else:
                out.losses["text"] = fused
        if microbatch.targets:
            out.conditions = flat[microbatch.target_positions]
        return out

    def next_logits(self, out: StageOutput) -> Tensor:
        """logits_V, float32, of the token after a row, from the last stage's output on it."""
        assert out.last is not None, "the last stage has run"
        return self.llm.logits(out.last[0, -1:])[0].float()

    def _by_level(self, items: Sequence[MediaItem], features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The features that replace embeddings, and as extras those of deeper levels, which are zero for encoders that
        have fewer levels than others."""
        levels = self.levels(items)
        if levels == 1:
            return features, {}
        rows = features.split([self.feature_rows(item) for item in items])
        stacked = [row.unflatten(0, (self._levels(item), item.rows)) for row, item in zip(rows, items, strict=True)]
        padded = [nn.functional.pad(level, (0, 0, 0, 0, 0, levels - len(level))) for level in stacked]
        joined = torch.cat(padded, dim=1)
        return joined[0], {"features": joined[1:]}

    def generate(
        self,
        conditions: list[Tensor],
        items: Sequence[TargetItem],
        names: Collection[str] = (),
        call: GeneratorCall[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The sum of the items' losses, for each generator that has items.

        Args:
            names: generators that run even if they have no items.
            call: runs a generator of `names`.
        """
        sums: dict[str, Tensor] = {}
        for name, generator in self.generators.items():
            assert isinstance(generator, Generator)
            mine = [i for i, item in enumerate(items) if item.generator == name]
            if mine or name in names:
                inputs = self._generator_inputs(generator, conditions, items, mine)
                sums[name] = call(generator, *inputs) if call is not None and name in names else generator(*inputs)
        return sums

    def sample(
        self,
        conditions: list[Tensor],
        items: Sequence[TargetItem],
        names: Collection[str] = (),
        call: GeneratorCall[list[Tensor]] | None = None,
    ) -> list[Tensor]:
        """One generated tensor per item, float32. Arguments as of `generate`."""
        made: list[Tensor | None] = [None] * len(items)
        for name, generator in self.generators.items():
            mine = [i for i, item in enumerate(items) if item.generator == name]
            if mine or name in names:
                assert isinstance(generator, Generator)
                inputs = self._generator_inputs(generator, conditions, items, mine)
                run = call if call is not None and name in names else type(generator).sample
                results = run(generator, *inputs)
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

    # -- losses ------------------------------------------------------------------------------------------------------

    def counts(self, batch: Batch) -> list[float]:
        """The divisor of each loss sum, in the order of `loss_names`: labelled tokens, microbatches, or targets."""
        useful = float(sum(microbatch.is_useful for microbatch in batch.microbatches))
        tokens = sum(len(microbatch.labels) for microbatch in batch.microbatches)
        targets = [item.generator for item in batch.targets]
        auxiliary = [useful] * len(self.llm.auxiliary_losses)
        return [float(tokens), *auxiliary, *(float(targets.count(name)) for name in self.generators)]

    def scales(self, counts: Tensor) -> Tensor:
        """Factor of each loss sum: weight / count of the whole step. A count of 0, whose sum is 0, is taken as 1."""
        weights = [self.loss_weights.get(name, 1.0) for name in self.loss_names]
        return from_host(weights, counts.dtype, counts.device) / counts.clamp(min=1.0)

    def metrics(self, sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Named scalars from the step's loss sums and counts."""
        parts = sums / counts.clamp(min=1.0)
        return {"loss": (sums * self.scales(counts)).sum(), **dict(zip(self.loss_names, parts.unbind(), strict=True))}


def _check_components(llm: LanguageModel, encoders: Mapping[str, Encoder], generators: Mapping[str, Generator]) -> None:
    """Check that the components fit together.

    Raises:
        TypeError: a component is not of its kind.
        ValueError: a component's width is not that of the LLM.
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
