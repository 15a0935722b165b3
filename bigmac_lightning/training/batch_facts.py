"""What the ranks of one pipeline must have alike of a batch, as texts by key: tokens, labels, positions, items.

Pixels and targets are not among it, because only an item's owner has them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bigmac_lightning.contracts.batch import Batch, MediaItem, TargetItem
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.training.agreement import digest, digest_of


def batch_facts(batch: object) -> dict[str, str]:
    """The facts of a batch. It reads all its tokens, so the batch should be on the CPU."""
    if not isinstance(batch, Batch):
        return {"type": type(batch).__name__}
    facts = {"microbatches": str(len(batch)), "step_counts": str(batch.step_counts)}
    for m, microbatch in enumerate(batch.microbatches):
        tensors = {
            **microbatch.inputs,
            "labels": microbatch.labels,
            "label_positions": microbatch.label_positions,
            "media_positions": microbatch.media_positions,
            "target_positions": microbatch.target_positions,
        }
        facts |= {f"microbatch {m} {name}": _tensor(tensor) for name, tensor in tensors.items()}
        facts[f"microbatch {m} llm_cost"] = repr(microbatch.llm_cost)
        facts[f"microbatch {m} media"] = "; ".join(_items(microbatch.media)) or "none"
        facts[f"microbatch {m} targets"] = "; ".join(_items(microbatch.targets)) or "none"
    return facts


def fingerprint(batch: object) -> int:
    """A number of 62 bits that depends on the facts of a batch."""
    return digest_of(batch_facts(batch))


def plan_digest(plan: Plan) -> int:
    """A number of 62 bits that depends on the actions of all ranks and on the groups."""
    return digest([repr(plan.groups), *(" ".join(map(str, row)) for row in plan.ranks)])


def _tensor(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} #{digest([data.numpy().tobytes()]):x}"


def _items(items: list[MediaItem] | list[TargetItem]) -> Iterator[str]:
    for item in items:
        name = item.encoder if isinstance(item, MediaItem) else f"{item.generator} {item.shape} seed {item.seed}"
        yield f"{name} rows {item.rows} cost {item.cost!r} owner {item.owner}.{item.peer}"
