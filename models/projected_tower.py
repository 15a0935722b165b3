"""What encoders of vision and sound share: a tower of the transformers library, and a projector to the LLM's width."""

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from bigmac_lightning.contracts.components import Encoder

from . import loading, meta_model
from .initialization import frozen_as, seeded
from .llm import attention


class ProjectedTower(Encoder):
    """A tower, then a linear layer or a two-layer perceptron.

    Attributes:
        config: the tower's config.
        tower: a model of the library.
        projector: maps from the tower's width to the LLM's. To train it alone, freeze "encoders.<name>.tower".
        width: the width of the features, D.
    """

    config: Any

    def _build(
        self,
        tower_width: int,
        width: int,
        projector_hidden: int | None,
        seed: int,
        attn_implementation: str,
        weights: str | None,
        gradient_checkpointing: bool,
    ) -> None:
        """Build the tower of the config and the projector on the meta device.

        Args:
            tower_width: the width of the projector's inputs.

        Raises:
            ValueError: the attention implementation is not installed, or the layers cannot run again.
        """
        self.config._attn_implementation = attn_implementation
        self.seed, self.source, self.gradient_checkpointing = seed, weights, gradient_checkpointing
        self.width = width
        self._widths = (tower_width, *([] if projector_hidden is None else [projector_hidden]), width)
        with attention.refused_clearly(attn_implementation, self.config.model_type), torch.device("meta"):
            self.tower: Any = AutoModel.from_config(self.config, trust_remote_code=False)  # it has a tower of its own
            self._keep(self.tower)
            self.projector = self._new_projector()
        if gradient_checkpointing:
            meta_model.check_checkpointing(self.tower)

    def _keep(self, tower: Any) -> None:
        """Drop modules that are not needed."""

    def _new_projector(self) -> nn.Module:
        first, *others = (nn.Linear(a, b) for a, b in pairwise(self._widths))
        return nn.Sequential(first, nn.GELU(), *others) if others else first

    def materialize(self) -> None:
        if next(self.tower.parameters()).is_meta:
            cut = loading.rows_over(self.shard_mesh)
            tower = loading.materialize(self.tower, self._keep, self.source, self.seed, torch.float32, cut)
            self.tower = frozen_as(self.tower, tower)
            if self.gradient_checkpointing:
                tower.activation_checkpointing_enable({"use_reentrant": False})
            with seeded(self.seed, "projector"):
                self.projector = frozen_as(self.projector, self._new_projector())
