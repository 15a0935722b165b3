"""The interface by which the executor uses a model and a batch."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bigmac_lightning.runtime.routing import Routing


@dataclass
class Outcome:
    """The outputs of a stage's forward on a microbatch.

    Attributes:
        hidden: hidden states for the next stage, of the shape that ``Computation.hidden_shape`` gives; ``None`` after
            the last stage.
        loss: scalar from which the last stage's backward starts, already scaled; ``None`` if the microbatch has no
            loss.
        conditions: hidden states of the last stage for the generators, [rows, width]; ``None`` if the microbatch has no
            generator targets.
    """

    hidden: Tensor | None = None
    loss: Tensor | None = None
    conditions: Tensor | None = None


class Computation(Protocol):
    """A model and one batch, as the executor uses them.

    Attributes:
        width: last dimension of features and conditions.
        dtype: dtype of hidden states, features and conditions.
        features: layout of the encoders' feature rows.
        conditions: layout of the generators' condition rows.
    """

    width: int
    dtype: torch.dtype
    features: Routing
    conditions: Routing

    def hidden_shape(self, microbatch: int, stage: int) -> tuple[int, ...]:
        """Return the shape of the tensor that a stage above 0 receives for a microbatch. It must be known before any
        stage runs."""
        ...

    def encode(self, group: int, piece: int) -> Tensor:
        """Run the encoders on a piece of this rank's share of a group; return the features, [rows, width]. An empty
        piece has 0 rows."""
        ...

    def forward(self, stage: int, microbatch: int, hidden: Tensor | None, features: Tensor | None) -> Outcome:
        """Run one stage on one microbatch.

        Args:
            stage: the stage.
            microbatch: the microbatch.
            hidden: hidden states from the stage before; ``None`` for stage 0.
            features: feature rows of the microbatch, [rows, width], for stage 0; ``None`` without media items.
        """
        ...

    def generate(self, group: int, piece: int, conditions: Tensor) -> Tensor | None:
        """Run the generators on a piece of this rank's share of a group, which may be empty; return the scaled loss, or
        ``None`` if the piece has none.

        Args:
            group: the group.
            piece: the piece.
            conditions: condition rows of the piece, [rows, width].
        """
        ...
