"""Lets ranks agree that a batch may run: all ranks of a pipeline have the same one, and no rank refuses it.

Another token or label on one rank would train silently, another shape would end in an error of the transport or in a
wait without end. So a few numbers are compared on the host before each batch. Batches themselves are exchanged only for
the error.
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from bigmac_lightning.contracts.outputs import Mode
from bigmac_lightning.ranks import Ranks
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.training.agreement import digest, message
from bigmac_lightning.training.batch_facts import batch_facts

log = logging.getLogger(__name__)

When = Literal["every", "first", "never"]


class BatchAgreement:
    """Compares batches over the world in training, and over each pipeline in evaluation, where pipelines may have
    different numbers of batches.

    Args:
        ranks: exchanges objects between all ranks.
        when: which batches are compared: every one, the first of each mode, or none.
    """

    def __init__(self, ranks: Ranks, mesh: PipelineMesh, when: When) -> None:
        self._ranks, self._mesh, self._when = ranks, mesh, when
        self._seen: set[Mode] = set()

    def compares(self, mode: Mode) -> bool:
        """Whether the next batch is compared; the same on all ranks."""
        if dist.get_world_size() == 1 or (mode != "train" and self._mesh.host_group is None):
            return False
        return self._when == "every" or (self._when == "first" and mode not in self._seen)

    def check(self, batch: object, own: Sequence[int], mode: Mode, error: Exception | None) -> None:
        """Compare a batch. Collective, and the hosts wait for each other.

        Args:
            own: numbers that depend on the batch, its plan and its place in the run.
            error: the error with which this rank refuses the batch.

        Raises:
            Exception: `error`; and on the other ranks a ValueError that names the rank that has it.
            ValueError: the batches differ; raised on all ranks.
        """
        first, training = mode not in self._seen, mode == "train"
        self._seen.add(mode)
        place, places = (self._mesh.dp_rank, self._mesh.dp_size) if training else (0, 1)
        group = self._ranks.group if training else self._mesh.host_group
        mine = digest(map(str, own))
        lowest = torch.iinfo(torch.int64).min
        numbers = torch.full((1 + 2 * places,), lowest, dtype=torch.int64)
        numbers[0] = error is not None
        numbers[1 + 2 * place], numbers[2 + 2 * place] = mine, -mine
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group)
        refused, *found = numbers.tolist()
        if refused:
            self._raise_refusal(error, group)
        most, least = found[::2], found[1::2]
        if any(high != -low for high, low in zip(most, least, strict=True)):
            self._raise_difference(batch, own, training, group)
        if first and training and self._mesh.dp_size > 1 and len(set(most)) < len(most) and dist.get_rank() == 0:
            log.warning(
                "Some pipelines have the same first batch, as if there were fewer of them: let the DataModule divide "
                "its data by trainer.distributed_sampler_kwargs"
            )

    def _raise_refusal(self, error: Exception | None, group: dist.ProcessGroup | None) -> None:
        everyone = _gather(None if error is None else f"{type(error).__name__}: {error}", group)
        if error is not None:
            raise error
        rank, text = next((rank, text) for rank, text in everyone.items() if text is not None)
        raise ValueError(f"rank {rank} refuses its batch: {text}")

    def _raise_difference(
        self, batch: object, own: Sequence[int], training: bool, group: dist.ProcessGroup | None
    ) -> None:
        section = f"pipeline {self._mesh.dp_rank}"
        facts = batch_facts(batch) | {"numbers of batch, plan and step": str(list(own))}
        everyone = _gather({section: facts}, group)
        rows = [everyone.get(rank, {}) for rank in range(dist.get_world_size())]
        raise ValueError(
            message(rows, "the batch of a pipeline") + "\nLet the DataModule give all ranks of a pipeline the same "
            "samples in the same order: by one seed, and by trainer.distributed_sampler_kwargs"
        )


def _gather(own: object, group: dist.ProcessGroup | None) -> dict[int, Any]:
    """The objects of all ranks of a group by global rank. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    members = dist.get_process_group_ranks(group)
    return dict(zip(members, everyone, strict=True))
