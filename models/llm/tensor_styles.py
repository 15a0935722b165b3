"""How modules compute that see slices only, beside the styles of transformers.

Shape suffixes: B samples, S tokens, I the slice of an MLP's inner values that this rank has.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.tensor_parallel import TensorParallelLayer

from bigmac_lightning.contracts.precision import widened

from .tensor_sums import summed, with_summed_gradient


class SummedGradients(TensorParallelLayer):
    """Of a norm that sees the heads of one rank only, so that each rank has a part of its weight's gradient.

    The library's own style sums ``.grad`` after each backward, and so what earlier microbatches have added to it once
    more.
    """

    def install_forward(self, module: Any, mesh: DeviceMesh) -> Any:
        normalize = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            own = {name: p for name, p in module._parameters.items() if p is not None}
            module._parameters.update({name: with_summed_gradient(p, mesh.get_group()) for name, p in own.items()})
            try:
                return normalize(*args, **kwargs)
            finally:
                module._parameters.update(own)

        module.forward = forward
        return module


class OwnHeads(TensorParallelLayer):
    """Of an attention module that reads its numbers of heads: it reads those of this rank (Llama 3.2 Vision)."""

    def install_forward(self, module: Any, mesh: DeviceMesh) -> Any:
        module.num_heads //= mesh.size()
        module.num_key_value_heads //= mesh.size()
        return module


class NewOutput(TensorParallelLayer):
    """Of a module to whose output the model adds in place, which autograd forbids for what a style returns."""

    def transform_output_post_forward(self, module: Any, output: Tensor, mesh: DeviceMesh) -> Tensor:
        return output.clone()


class SparseSlices(TensorParallelLayer):
    """Of an MLP that keeps of a token's inner values those that are large among all of them (Gemma 3n)."""

    def install_forward(self, module: Any, mesh: DeviceMesh) -> Any:
        def sparse(gate_BSI: Tensor) -> Tensor:
            return torch.relu(gate_BSI - _cutoff(gate_BSI, module.activation_sparsity, mesh))

        if module.activation_sparsity > 0:
            module._gaussian_topk = sparse
        return module


def _cutoff(gate_BSI: Tensor, sparsity: float, mesh: DeviceMesh) -> Tensor:
    """The value below which this part of a token's values lies, on all ranks, if they are normally distributed."""
    group, count = mesh.get_group(), gate_BSI.shape[-1] * mesh.size()

    def mean(values_BSI: Tensor) -> Tensor:
        return with_summed_gradient(summed(values_BSI.sum(-1, keepdim=True), group), group) / count

    wide_BSI = widened(gate_BSI)
    middle = mean(wide_BSI)
    variance = mean((wide_BSI - middle) ** 2)
    varies = variance > 0  # where all values are equal, the deviation has no gradient
    deviation = torch.where(varies, variance, 1.0).sqrt() * varies
    factor = torch.special.ndtri(torch.tensor(sparsity, dtype=wide_BSI.dtype, device=gate_BSI.device))
    return (middle + factor * deviation).to(gate_BSI.dtype)
