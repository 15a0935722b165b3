"""The contracts of a model's components: encoders, a language model that can be cut between layers, generators.

A component is single-device code. Ranks, schedules and Lightning do not appear in it.

Shape suffixes: B samples, S tokens, D width of the LLM, L labelled positions, N rows of features or conditions,
V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from bigmac_lightning.contracts.batch import TargetItem
from bigmac_lightning.contracts.parallel import ParallelSizes, StagePeers
from bigmac_lightning.contracts.precision import weight_dtype
from bigmac_lightning.contracts.token_loss import token_loss
from bigmac_lightning.estimates.forward_cost import ForwardCost, forward_cost
from bigmac_lightning.estimates.partition import LayerCosts


class Encoder(nn.Module, ABC):
    """Turns media into features of the LLM's width. The features of an item must not depend on other items.

    Attributes:
        width: width of the features, D; 0 if it is not known before the encoder runs.
        levels: feature rows per token of an item: 1; or more, if further layers of the LLM besides the embedding take
            features (see `LanguageModel.run_layers`).
        gradient_checkpointing: whether its layers save only their inputs, and run again in the backward.
        dtype: type that `materialize` gives the weights; ``None``: it does not convert them.
        shard_mesh: the ranks on which weights will lie in shards, while `materialize` runs; ``None``: they will not.
            `materialize` may then leave rows of parameters: DTensors on this mesh, cut along their first dimension.
    """

    width: int = 0
    levels: int = 1
    gradient_checkpointing: bool = False
    dtype: torch.dtype | None = None
    shard_mesh: DeviceMesh | None = None

    def materialize(self) -> None:
        """Give weights to the parameters that ``__init__`` left on the meta device. Called once, before all else."""

    def input_dtype(self) -> torch.dtype | None:
        """The type that an item's floating-point data are converted to: here, that of the weights; ``None``: none."""
        return weight_dtype(self)

    def forward_cost(self, rows: int) -> ForwardCost:
        """Estimated cost of the forward on an item of so many feature rows.

        By default every matrix multiplies every row. Override it where that is not so.
        """
        return forward_cost(self, rows)

    @abstractmethod
    def forward(self, pixels: list[Any]) -> Tensor:
        """Encode items of any mix of sizes.

        Args:
            pixels: `MediaItem.data` of each item: a tensor, or a dict of tensors. Floating-point tensors have the
                `input_dtype`.

        Returns: features_ND, the rows of all items one after another; N is the sum of the items' `rows` * `levels`.
            The rows of an item are ordered by level.
        """

    def batches(self, pixels: Sequence[Any]) -> list[list[int]]:
        """Indices of the items that one pass through the layers takes together: here, all of them. If weights are
        sharded as fsdp, each batch is a call of its own. Override it if `forward` runs its layers more than once."""
        return [list(range(len(pixels)))]

    def smallest(self) -> Any:
        """The data of a smallest item, in the `input_dtype`. If weights are sharded as fsdp, ranks without items run
        it, because all ranks gather weights together.

        Raises:
            ValueError: there is none.
        """
        raise ValueError(
            f"{type(self).__name__} has no method `smallest`, which fsdp needs: define it, or set sharding.encoders to "
            "zero1 or ddp"
        )


class LanguageModel(nn.Module, ABC):
    """A decoder that can be cut between layers. It is built without weights; `materialize` gives it those of a part.

    Attributes:
        num_layers: number of layers that can be spread over stages.
        width: width of the hidden states, D.
        vocabulary: number of token ids, V. Ids must be below it, and the loss bounds by it how many logits are in
            memory at once. 0 if it is not known.
        placeholders: by modality, such as "image", the token id that features replace; it may lie beyond the
            vocabulary. A DataModule must use the same ids.
        tied: ``{"lm_head.weight": "model.embed_tokens.weight"}`` if the output weight is the embedding, by names
            inside this module; empty if nothing is tied. In one process both are one parameter. If they are on
            different ranks, each rank has a copy, and the gradients of the copies are summed.
        auxiliary_losses: names of the losses that layers give (load balancing of experts), with their default weights.
            Such a loss is a mean over microbatches.
        exact_extras: names of extras (see below) that are sent in float32 even if the weights have a 16-bit type.
        adds_features: whether features are added to the embeddings of their tokens, instead of replacing them.
        attends_to_features: whether layers attend to features. These then neither replace embeddings nor are added to
            them: they are the extra "features", (1, N, D), and a microbatch without media skips parts of the layers.
        refuses_packing: the reason why a row must not have several samples; empty if it may.
        sees_prompts: whether the tokens before the first labelled one of a row see each other both ways. `prepare` then
            gets ``inputs["prompt_tokens"]``, (B,), how many these are.
        gradient_checkpointing: whether layers save only their inputs, and run again in the backward.
        dtype: type that `materialize` gives the weights; ``None``: it does not convert them.
        shard_mesh: the ranks on which weights will lie in shards, while `materialize` runs; ``None``: they will not.
            `materialize` may then leave rows of parameters: DTensors on this mesh, cut along their first dimension.

    *Extras* are further tensors that go with a microbatch's hidden states from layer to layer, and so from stage to
    stage; gradients flow back through them. Most models have none.
    """

    num_layers: int
    width: int
    vocabulary: int = 0
    placeholders: Mapping[str, int] = {}
    tied: dict[str, str]
    auxiliary_losses: dict[str, float] = {}
    exact_extras: Collection[str] = ()
    refuses_packing: str = ""
    adds_features: bool = False
    sees_prompts: bool = False
    attends_to_features: bool = False
    gradient_checkpointing: bool = False
    dtype: torch.dtype | None = None
    shard_mesh: DeviceMesh | None = None

    @abstractmethod
    def materialize(
        self, layers: Collection[int], embedding: bool, head: bool, peers: StagePeers = StagePeers()
    ) -> None:
        """Allocate and initialise these layers, the embedding and the head (final norm, output weight); drop the rest.

        Weights depend on the seed and the parameter's name only. Names stay those of the whole model.

        Args:
            peers: the ranks that `parallelize` will be called with, if it will be. A model may then make only this
                rank's slices of the weights, so that no rank needs memory for whole layers.
        """

    def keep(self, layers: Collection[int], embedding: bool, head: bool) -> None:
        """Drop all weights but those of these layers, and of the embedding and the head if they are wanted.

        It is called on a model that has all of its weights.

        Raises:
            ValueError: this model cannot drop weights.
        """
        raise ValueError(
            f"{type(self).__name__} has all its weights already, and has no method `keep` that drops those of other "
            "ranks: train a module whose configure_model has not been called"
        )

    def why_not_parallel(self, sizes: ParallelSizes) -> str:
        """Why the work of a stage cannot be divided so, in words that name what to change; empty if it can.

        It is asked before any weights are made.
        """
        if sizes == ParallelSizes():
            return ""
        return f"{type(self).__name__} has no method `parallelize`: leave out the sizes of tensor, context, expert"

    def parallelize(self, peers: StagePeers) -> None:
        """Divide the work of this part over several ranks. Called once, after `materialize`, on all of these ranks.

        Weights of which each rank has a slice become DTensors on the given meshes. From then on the methods below are
        called on all ranks together. Hidden states and their gradients are the same on the ranks of `peers.tensor`. On
        the ranks of `peers.context`, ``h_BSD`` has the rank's slice of each row.
        """
        raise ValueError(self.why_not_parallel(ParallelSizes(2, 2, 2)))

    @abstractmethod
    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        """h_BSD from `inputs["input_ids"]`."""

    @abstractmethod
    def run_layers(self, h_BSD: Tensor, inputs: dict[str, Tensor], layers: range, extras: dict[str, Tensor]) -> Tensor:
        """h_BSD after these consecutive layers; after the last one the final norm is applied as well.

        Args:
            extras: the extras that came with the hidden states. They are changed in place to those that go on. If
                encoders give more than one level, layer 0 gets "features" of shape (levels - 1, N, D), whose rows
                belong to the tokens at `inputs["media_positions"]`; if layers attend to features, (1, N, D).
        """

    def extra_shapes(
        self, layer: int, rows: tuple[int, int], media_rows: int, levels: int
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the extras that go into `layer` > 0, in a fixed order.

        Args:
            rows: B and S of the microbatch.
            media_rows: N, number of the microbatch's tokens that features replace.
            levels: number of levels of those features; 1 if there are none.
        """
        return {}

    def auxiliary(self, extras: dict[str, Tensor]) -> dict[str, Tensor]:
        """The auxiliary losses of a microbatch, scalars by name, from the extras after the last layer."""
        return {}

    def costs(self, sample_tokens: int = 0) -> LayerCosts:
        """Estimated forward time per token of each layer, of the embedding, and of the head, in one unit.

        Args:
            sample_tokens: number of tokens of a sample, with which attention's part of the time grows; 0: this part is
                left out.
        """
        return LayerCosts((1.0,) * self.num_layers)

    def saved_activations(self) -> LayerCosts:
        """Estimated numbers per token that each part saves for the backward without `gradient_checkpointing`."""
        return LayerCosts((0.0,) * self.num_layers)

    def slices(self, sizes: ParallelSizes) -> Mapping[nn.Parameter, int]:
        """Into how many slices of equal size `parallelize` would cut each parameter; without those that stay whole."""
        return {}

    def divided_costs(self, sizes: ParallelSizes, sample_tokens: int = 0) -> LayerCosts:
        """As `costs`, of one of the processes that `parallelize` lets compute a stage, per token that it has."""
        return self.costs(sample_tokens)

    def divided_activations(self, sizes: ParallelSizes) -> LayerCosts:
        """As `saved_activations`, of one of these processes, per token that it has."""
        return self.saved_activations()

    def parameters_of(self, layers: Collection[int], embedding: bool, head: bool) -> Iterable[nn.Parameter]:
        """The parameters that `materialize` would give weights to, before it is called; empty if they are not known."""
        return ()

    def prepare(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A microbatch's inputs with all that its stages need (positions, ...). Calling it twice changes nothing."""
        return inputs

    def new_cache(self, layers: range) -> Any:
        """What keeps keys and values of a stage's layers while a text is written token by token; ``None``: this model
        keeps nothing, and all tokens run again for each new one. Tensor peers call it together."""
        return None

    @contextmanager
    def using_cache(self, cache: Any) -> Iterator[None]:
        """Within this context, `run_layers` gets the layers that the cache was made for, and tokens that follow those
        in the cache, and adds them to it. Rows hold one sample each. ``None``: without a cache."""
        yield

    @abstractmethod
    def logits(self, h_LD: Tensor) -> Tensor:
        """logits_LV of normed hidden states."""

    def text_loss(self, h_LD: Tensor, labels: Tensor, predict: bool) -> tuple[Tensor, Tensor | None]:
        """The sum of the token losses of normed hidden states; with `predict` also the most likely tokens, (L,)."""
        return token_loss(self.logits, h_LD, labels, self.vocabulary, predict)

    def fused_loss(self, h_LD: Tensor, labels: Tensor) -> Tensor | None:
        """The sum of the token losses of normed hidden states, computed together with its gradients (see
        `fused_token_loss`). ``None``: the loss is that of `text_loss`."""
        return None


class Generator(nn.Module, ABC):
    """Learns to generate targets (images, ...) conditioned on the LLM's final hidden states.

    Attributes:
        width: width of the conditions, D; 0: any width.
        gradient_checkpointing: whether its layers save only their inputs, and run again in the backward.
        dtype: type that `materialize` gives the weights; ``None``: it does not convert them.
        shard_mesh: the ranks on which weights will lie in shards, while `materialize` runs; ``None``: they will not.
            `materialize` may then leave rows of parameters: DTensors on this mesh, cut along their first dimension.
    """

    width: int = 0
    gradient_checkpointing: bool = False
    dtype: torch.dtype | None = None
    shard_mesh: DeviceMesh | None = None

    def materialize(self) -> None:
        """Give weights to the parameters that ``__init__`` left on the meta device. Called once, before all else."""

    def input_dtype(self) -> torch.dtype | None:
        """The type that conditions and targets are converted to: here, that of the weights; ``None``: no change."""
        return weight_dtype(self)

    def forward_cost(self, shape: tuple[int, ...], rows: int) -> ForwardCost:
        """Estimated cost of the forward on a target, without the backward.

        By default every matrix multiplies every condition row and every cell of the target. Override it where that is
        not so.

        Args:
            shape: shape of the target.
            rows: number of condition rows.
        """
        return forward_cost(self, rows + math.prod(shape[1:]))

    @abstractmethod
    def forward(self, conditions: list[Tensor], items: list[TargetItem]) -> Tensor:
        """The sum over items of each item's mean loss, a scalar.

        Args:
            conditions: condition_ND per item, N = `item.rows`.
            items: the items, with `data`; draw noise from a `torch.Generator` seeded by `item.seed`.
        """

    @abstractmethod
    def sample(self, conditions: list[Tensor], items: list[TargetItem]) -> list[Tensor]:
        """Generate one tensor of shape `item.shape` per item; `item.data` is not read."""

    def batches(self, items: Sequence[TargetItem]) -> list[list[int]]:
        """Indices of the items that one pass through the layers takes together: here, all of them. If weights are
        sharded as fsdp, each batch is a call of its own. Override it if `forward` runs its layers more than once."""
        return [list(range(len(items)))]

    def smallest(self) -> tuple[Tensor, TargetItem]:
        """A smallest item with its data, and its condition_ND, both in the `input_dtype`. If weights are sharded as
        fsdp, ranks without items run it, because all ranks gather weights together.

        Raises:
            ValueError: there is none.
        """
        raise ValueError(
            f"{type(self).__name__} has no method `smallest`, which fsdp needs: define it, or set sharding.generators "
            "to zero1 or ddp"
        )


def trained_share(parameters: Iterable[nn.Parameter]) -> float:
    """The fraction of the weights that is trained; 1 if there are none."""
    known = list(parameters)
    whole = sum(parameter.numel() for parameter in known)
    return sum(parameter.numel() for parameter in known if parameter.requires_grad) / whole if whole else 1.0
