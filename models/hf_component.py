"""What `HFDecoder` and `HFVisionEncoder` share: a component that is some of the modules of one Hugging Face model.

The whole model is built on the meta device, where it costs no memory, and what the component does not need is dropped.
The modules that stay are the component's own children, so that parameters keep the names of the whole model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from . import loading, meta_model
from .families import family_of
from .initialization import to_config


class HFComponent(nn.Module):
    """Holds a Hugging Face model without registering it as a child.

    Attributes:
        config: the config of the whole model.
        family: the kind of vision-language model; ``None``: the model is text only.
        seed: the seed of initial weights.
        source: the folder that the weights are read from; ``None``: the weights are drawn.
        dtype: the type of the weights; ``None``: as in the checkpoint.
    """

    gradient_checkpointing: bool = False

    def _configure(
        self,
        config: dict[str, Any] | str | PreTrainedConfig,
        seed: int,
        attn_implementation: str,
        weights: str | None,
        dtype: str,
        gradient_checkpointing: bool,
        trust_remote_code: bool = False,
    ) -> None:
        """Set the attributes from the arguments of the constructor.

        Raises:
            ValueError: transformers has no such model, or the model cannot be trained in a pipeline.
        """
        self.config = to_config(config, trust_remote_code)
        self.family = family_of(self.config)
        self.seed, self.source = seed, weights
        self.dtype: torch.dtype | None = None if dtype == "auto" else getattr(torch, dtype)
        self.gradient_checkpointing = gradient_checkpointing
        self._attention, self._trusts_code = attn_implementation, trust_remote_code

    def build_whole(self) -> Any:
        """The whole model on the meta device.

        Raises:
            ValueError: transformers cannot build it, or its layers cannot run again in the backward.
        """
        whole = meta_model.build_on_meta(self.config, self._attention, self._trusts_code)
        if self.gradient_checkpointing:
            meta_model.check_checkpointing(whole)
        return whole

    def _hold(self, whole: Any) -> None:
        """Make a model's children the children of this component.

        The model itself lies in a tuple, because as a child it would put its own name before every parameter. The dict
        of children is shared, so that an adapter that takes a child's place here takes it in the model, too.
        """
        self._unregistered = (whole,)
        self._modules = whole._modules

    @property
    def _whole(self) -> Any:
        return self._unregistered[0]

    def _materialized(self, keep: Callable[[Any], None], cut: loading.Cut | None = None) -> Any:
        """A model with weights on the CPU for what `keep` leaves of it; see `loading.materialize`."""
        whole = loading.materialize(self._whole, keep, self.source, self.seed, self.dtype, cut)
        if self.gradient_checkpointing:
            whole.activation_checkpointing_enable({"use_reentrant": False})
        return whole
