"""Embedding, logits and text loss where each rank of a group has a slice of the vocabulary.

No rank has the whole table, nor all logits of a position. What the model does to its logits (a soft cap, a scale, a
bias) is done to each slice by the model itself, so it must treat each logit alone (see `head.check_elementwise`).

Shape suffixes: L labelled positions, D width, V the slice of the vocabulary that this rank has.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers.distributed.tensor_parallel import EmbeddingParallel

from bigmac_lightning.contracts.precision import widened
from bigmac_lightning.contracts.token_loss import CHUNK_ELEMENTS, chunked_gradients

from .tensor_sums import summed


@dataclass(frozen=True)
class VocabularySlice:
    """The token ids whose rows a rank has.

    Attributes:
        mesh: the ranks that have the other slices; a mesh of one dimension.
        size: the number of token ids of each rank.
    """

    mesh: DeviceMesh
    size: int

    @property
    def first(self) -> int:
        """The first token id of this rank."""
        return self.mesh.get_local_rank() * self.size

    def loss(self, logits_LV: Tensor, labels: Tensor, predict: bool) -> tuple[Tensor, Tensor | None]:
        """The sum of the token losses, and with `predict` the most likely tokens; the same on all ranks."""
        loss = _CrossEntropy.apply(widened(logits_LV), labels, self)
        return loss, self.most_likely(logits_LV) if predict else None

    def most_likely(self, logits_LV: Tensor) -> Tensor:
        """The token with the largest logit of all slices, (L,); of equal ones the first."""
        values, ids = logits_LV.detach().max(-1)
        all_values, all_ids = self._gathered(values), self._gathered(ids + self.first)
        return all_ids.gather(0, all_values.argmax(0, keepdim=True))[0]

    def whole(self, logits_LV: Tensor) -> Tensor:
        """All logits, on all ranks."""
        return DTensor.from_local(logits_LV, self.mesh, [Shard(-1)], run_check=False).full_tensor()

    def gradients(
        self, h_LD: Tensor, weight_VD: Tensor, labels: Tensor, of_weight: bool, chunk_elements: int = CHUNK_ELEMENTS
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `chunked_gradients`, of this rank's slice of the output weight."""
        loss, part_LD, gradient_VD = chunked_gradients(
            h_LD, weight_VD, labels, of_weight, chunk_elements, self.loss_and_gradient
        )
        by_hidden = part_LD.to(torch.promote_types(h_LD.dtype, torch.float32))
        dist.all_reduce(by_hidden, group=self.mesh.get_group())
        return loss, by_hidden.to(h_LD.dtype), gradient_VD

    def loss_and_gradient(self, logits_LV: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the token losses, and its gradient by the logits of this rank."""
        group = self.mesh.get_group()
        largest = logits_LV.amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        shifted = logits_LV - largest[:, None]
        own = labels - self.first
        mine = (own >= 0) & (own < self.size)
        own = own.clamp(0, self.size - 1)[:, None]
        of_label = shifted.gather(1, own)[:, 0].masked_fill(~mine, 0.0)
        shares = shifted.exp_()
        both = torch.stack([shares.sum(-1), of_label])  # one message for both sums
        dist.all_reduce(both, group=group)
        loss = (both[0].log() - both[1]).sum()
        shares /= both[0][:, None]
        shares.scatter_add_(1, own, -mine.to(shares.dtype)[:, None])
        return loss, shares

    def _gathered(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, stacked."""
        parts = [torch.empty_like(tensor) for _ in range(self.mesh.size())]
        dist.all_gather(parts, tensor.contiguous(), group=self.mesh.get_group())
        return torch.stack(parts)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_LV: Tensor, labels: Tensor, part: VocabularySlice) -> Tensor:
        loss, gradient = part.loss_and_gradient(logits_LV, labels)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None


class VocabularyEmbedding(EmbeddingParallel):
    """Looks up the tokens of this rank and sums over the ranks.

    The library's own style has the embedding computed by DTensor, which takes the padding token's row for one of every
    rank's slice, so that another token's gradient is lost.
    """

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return True

    def install_forward(self, module: Any, mesh: DeviceMesh) -> Any:
        looked_up, padding = module.forward, module.padding_idx

        def forward(ids: Tensor) -> Tensor:
            part = VocabularySlice(mesh, module.num_embeddings // mesh.size())
            own = ids - part.first
            mine = (own >= 0) & (own < part.size)
            with self.context_around_forward(module, mesh), _padding(module, padding, part):
                found = looked_up(own.masked_fill(~mine, 0))
            return summed(found.masked_fill(~mine[..., None], 0.0), mesh.get_group())

        module.forward = forward
        return module


@contextmanager
def _padding(module: Any, padding: int | None, part: VocabularySlice) -> Iterator[None]:
    """The padding token, whose row gets no gradient, by its place in this rank's slice."""
    own = None if padding is None else padding - part.first
    module.padding_idx = own if own is not None and 0 <= own < part.size else None
    try:
        yield
    finally:
        module.padding_idx = padding
