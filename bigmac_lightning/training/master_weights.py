"""Float32 master weights: under the precisions bf16-true and 16-true, weights that lie in shards are float32, and only
the whole weights that are gathered for computing are 16-bit."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from lightning.pytorch.plugins import HalfPrecision, Precision
from torch import nn

from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.training.options import ShardingOptions


class MasterPrecision(HalfPrecision):
    """bf16-true or 16-true for a model whose shards are float32.

    Attributes:
        computing: the 16-bit type in which the model computes.

    Args:
        precision: "bf16-true" or "16-true".
        sharding: which components lie in shards.
    """

    def __init__(self, precision: Any, sharding: ShardingOptions) -> None:
        super().__init__(precision)
        self.computing, self._sharding = self._desired_input_dtype, sharding

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Initial weights are drawn in float32; with 16 bits the masters would start from rounded values."""
        return _DtypeContextManager(torch.float32)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert weights of components in shards to float32, and all else to 16 bits."""
        assert isinstance(module, PipelineModule)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                master = isinstance(tensor, nn.Parameter) and self._is_sharded(name)
                tensor.data = tensor.data.to(torch.float32 if master else self.computing)
        return module

    def _is_sharded(self, name: str) -> bool:
        return self._sharding.of_component(name) != "ddp"


def with_master_weights(precision: Precision, sharding: ShardingOptions) -> Precision:
    """The precision of a run: the given one, or that with master weights if the options ask for them.

    Raises:
        ValueError: the given precision has no use for master weights.
    """
    if not sharding.master_weights or isinstance(precision, MasterPrecision):
        return precision
    if not isinstance(precision, HalfPrecision):
        raise ValueError(
            f"sharding.master_weights is for precision bf16-true or 16-true, but this is {precision.precision}, which "
            "keeps weights as they are: leave master_weights out, or change the precision"
        )
    return MasterPrecision(precision.precision, sharding)
