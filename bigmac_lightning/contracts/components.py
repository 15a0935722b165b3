"""The contracts of a model's components: encoders, a language model that can be cut between layers, generators.

All single-device code. Knows tensors, items and estimates of work; knows nothing of Lightning, ranks or schedules.

Shape suffixes: B samples, S tokens, D width of the LLM, L labelled positions, N rows of features or conditions,
V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bigmac_lightning.contracts.batch import TargetItem
from bigmac_lightning.contracts.precision import weight_dtype
from bigmac_lightning.estimates.forward_cost import ForwardCost, forward_cost
from bigmac_lightning.estimates.partition import LayerCosts


class Encoder(nn.Module, ABC):
    """Turns media into features of the LLM's width. Single-device; items are independent of one another.

    Attributes:
        width: of the features, D; 0: not known before it runs.
        levels: feature rows per token of an item: 1, or more where layers of the LLM take features of their own besides
            the embedding's (see `LanguageModel.run_layers`).
        gradient_checkpointing: whether its layers keep their inputs only and run again in the backward.
        dtype: of the weights, where `materialize` changes it.
    """

    width: int = 0
    levels: int = 1
    gradient_checkpointing: bool = False
    dtype: torch.dtype | None = None

    def materialize(self) -> None:
        """Give weights to what ``__init__`` left on the meta device; called once, before anything else is."""

    def input_dtype(self) -> torch.dtype | None:
        """What floating-point data of an item are turned into: the type of the weights; ``None``: they stay."""
        return weight_dtype(self)

    def work(self, rows: int) -> ForwardCost:
        """Estimated work of the forward of an item that makes so many rows; here, each row meets every matrix."""
        return forward_cost(self, rows)

    @abstractmethod
    def forward(self, pixels: list[Any]) -> Tensor:
        """Encode items of any mix of sizes.

        Args:
            pixels: of each item what the DataModule put into `MediaItem.data`: a tensor, or a dict of tensors where
                the encoder has to know more of it. Floating-point ones have the `input_dtype`.

        Returns: features_ND, the rows of all items one after another; N is the sum of the items' `rows` * `levels`.
            An item's rows stand level after level.
        """


class LanguageModel(nn.Module, ABC):
    """A decoder that can be cut between layers. Built without weights; `materialize` fills the part that is kept.

    Attributes:
        num_layers: number of layers that can be spread over stages.
        width: D.
        vocabulary: V, which token ids must lie below, and by which the loss bounds how many logits it holds at once; 0:
            not known.
        placeholders: token ids that features replace; they need not lie in the vocabulary.
        tied: ``{"lm_head.weight": "model.embed_tokens.weight"}`` where the output weight is the embedding, by names
            inside this module; empty where nothing is tied. In one process it is one parameter; where the two lie on
            different ranks each holds a copy and their gradients are summed.
        auxiliary_losses: default weight of each loss that comes from the layers themselves (load balancing of experts),
            by name. Such a loss is a mean over microbatches.
        exact_extras: names of extras (see below) that travel in float32 whatever the type of the weights.
        refuses_packing: why a row must not hold several samples; empty: it may.
        gradient_checkpointing: whether layers keep their inputs only and run again in the backward.
        dtype: of the weights, where `materialize` changes it.

    *Extras* are further tensors that go with a microbatch's hidden states from layer to layer, and so from stage to
    stage; gradients flow back through them. A model without any ignores them.
    """

    num_layers: int
    width: int
    vocabulary: int = 0
    placeholders: Sequence[int] = ()
    tied: dict[str, str]
    auxiliary_losses: dict[str, float] = {}
    exact_extras: Collection[str] = ()
    refuses_packing: str = ""
    gradient_checkpointing: bool = False
    dtype: torch.dtype | None = None

    @abstractmethod
    def materialize(self, layers: Collection[int], embedding: bool, head: bool) -> None:
        """Allocate and initialise these layers, the embedding and the head (final norm, output weight); drop the rest.

        Weights depend on the seed and the parameter's name only. Names stay those of the whole model.
        """

    def keep(self, layers: Collection[int], embedding: bool, head: bool) -> None:
        """Drop all but these layers, the embedding and the head, once all of them have weights.

        Raises:
            ValueError: this model cannot.
        """
        raise ValueError(
            f"{type(self).__name__} has all its weights already, and has no `keep`, by which a rank would drop what is "
            "not its own: train a module whose configure_model has not been called"
        )

    @abstractmethod
    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        """h_BSD from `inputs["input_ids"]`."""

    @abstractmethod
    def run_layers(self, h_BSD: Tensor, inputs: dict[str, Tensor], layers: range, extras: dict[str, Tensor]) -> Tensor:
        """h_BSD after these consecutive layers; after the last one the final norm is applied as well.

        Args:
            extras: what came with the hidden states; changed in place to what goes on with them. Layer 0 gets
                "features" of shape (levels - 1, N, D), whose rows belong to the tokens at `inputs["media_positions"]`,
                if encoders give more than one level.
        """

    def extra_shapes(self, layer: int, media_rows: int, levels: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the extras that go into `layer` > 0, in a fixed order.

        Args:
            media_rows: N, tokens of the microbatch that features replace.
            levels: of those features; 1 if there are none.
        """
        return {}

    def auxiliary(self, extras: dict[str, Tensor]) -> dict[str, Tensor]:
        """The `auxiliary_losses` of a microbatch, scalars, from the extras that came out of the last layer."""
        return {}

    def costs(self, sample_tokens: int = 0) -> LayerCosts:
        """Estimated forward time per token of each layer and of what the first and last stage do besides.

        Args:
            sample_tokens: of a sample, which attention's part of the time grows with; 0: leave that part out.
        """
        return LayerCosts((1.0,) * self.num_layers)

    def kept(self) -> LayerCosts:
        """Estimated numbers per token that each part keeps for the backward, without `gradient_checkpointing`."""
        return LayerCosts((0.0,) * self.num_layers)

    def parameters_of(self, layers: Collection[int], embedding: bool, head: bool) -> Iterable[nn.Parameter]:
        """What `materialize` would keep, while nothing has been dropped yet; nothing if that is not known."""
        return ()

    def prepare(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Complete a microbatch's inputs by what all stages need (positions, ...); does nothing the second time."""
        return inputs

    @abstractmethod
    def logits(self, h_LD: Tensor) -> Tensor:
        """logits_LV of normed hidden states."""

    def fused_loss(self, h_LD: Tensor, labels: Tensor) -> Tensor | None:
        """The sum of the token losses of normed hidden states, made together with its gradients; see
        `fused_token_loss`. ``None``: it is to be made of `logits`."""
        return None


class Generator(nn.Module, ABC):
    """Learns to make targets (images, ...) conditioned on the LLM's final hidden states. Single-device.

    Attributes:
        width: of the conditions, D; 0: any.
        gradient_checkpointing: whether its layers keep their inputs only and run again in the backward.
        dtype: of the weights, where `materialize` changes it.
    """

    width: int = 0
    gradient_checkpointing: bool = False
    dtype: torch.dtype | None = None

    def materialize(self) -> None:
        """Give weights to what ``__init__`` left on the meta device; called once, before anything else is."""

    def input_dtype(self) -> torch.dtype | None:
        """What conditions and targets are turned into: the type of the weights; ``None``: they stay."""
        return weight_dtype(self)

    def work(self, shape: tuple[int, ...], rows: int) -> ForwardCost:
        """Estimated work of the forward on a target, the backward left out; here, each condition row and each cell of
        the target meets every matrix.

        Args:
            shape: of the target.
            rows: of the conditions.
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
        """Make one thing of shape `item.shape` per item; `item.data` is not read."""


def trained_share(parameters: Iterable[nn.Parameter]) -> float:
    """The share of the weights that is trained; of none: 1."""
    known = list(parameters)
    whole = sum(parameter.numel() for parameter in known)
    return sum(parameter.numel() for parameter in known if parameter.requires_grad) / whole if whole else 1.0
