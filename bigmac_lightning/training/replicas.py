"""Compares weights and summed gradients that several ranks have alike, to find silent corruption: a broken device or
cable, or code that changes the weights of one rank.

Ranks that get the same sums of gradients have the same bits, so sums of bit patterns are compared. Each tensor peer
computes the gradients of what they share by itself, so their norms are compared, but for rounding. Shards that only one
rank has are left out.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.ranks import Ranks
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.runtime.sharding import is_slice, local
from bigmac_lightning.training.agreement import SHOWN, check_same, ranks_text
from bigmac_lightning.training.run_facts import llm_part, part_of
from bigmac_lightning.training.sharding import Sharding

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by the size of a number in bytes."""


ROUNDING = 1e-3
"""By how much norms of tensor peers may differ, relative to the largest."""


def check_replicas(ranks: Ranks, module: PipelineModule, mesh: PipelineMesh, sharding: Sharding) -> None:
    """Compare the parameters and their gradients. Collective over the world, and the host waits for the device.

    Raises:
        ValueError: some differ; raised on all ranks, with their names and the ranks.
    """
    exact: dict[tuple[str, str], Tensor] = {}
    norms: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        for prefix, tensor in (("", parameter), ("gradient of ", parameter.grad)):
            if tensor is None or not local(tensor).numel():
                continue
            for section, alias in _sections(name, parameter, module, mesh, sharding):
                exact[section, prefix + alias] = checksum(local(tensor.detach())).to(mesh.device)
            if (
                mesh.tp_size > 1
                and name.startswith("llm.")
                and not is_slice(parameter)
                and "llm" not in sharding.sharded
            ):
                norms[prefix + name] = tensor.detach().norm(dtype=torch.float64)
    found: dict[str, dict[str, str]] = {}
    values = torch.stack(list(exact.values())).tolist() if exact else []
    for (section, what), value in zip(exact, values, strict=True):
        found.setdefault(section, {})[what] = f"#{value:x}"
    check_same(ranks, found, "the weights and gradients of replicas")
    if mesh.tp_size > 1:
        values = torch.stack(list(norms.values())).tolist() if norms else []
        _check_norms(
            ranks,
            f"replica {mesh.dp_rank}, {mesh.cp_rank}, pipeline rank {mesh.pp_rank}",
            dict(zip(norms, values, strict=True)),
        )


def _check_norms(ranks: Ranks, place: str, norms: Mapping[str, float]) -> None:
    """Compare norms between the ranks of a place. Collective over the world."""
    everyone = ranks.exchange((place, norms))()[0]
    lines: list[str] = []
    for here in dict.fromkeys(place for place, _ in everyone):
        peers = {rank: known for rank, (at, known) in enumerate(everyone) if at == here}
        most = max((value for known in peers.values() for value in known.values()), default=0.0)
        for name in dict.fromkeys(name for known in peers.values() for name in known):
            values = [known.get(name, 0.0) for known in peers.values()]
            if not max(values) - min(values) <= max(ROUNDING * max(values), 1e-6 * most):
                lines.append(f"{name} has the norms {values} on {ranks_text(peers)}")
    if lines:
        raise ValueError("what tensor peers share must be the same, but differs:\n  " + "\n  ".join(lines[:SHOWN]))


def checksum(tensor: Tensor) -> Tensor:
    """The sum of the bit patterns of a tensor's numbers, as an int64 scalar on its device."""
    parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return parts.contiguous().view(BITS[parts.element_size()]).sum(dtype=torch.int64)


def _sections(
    name: str, parameter: Tensor, module: PipelineModule, mesh: PipelineMesh, sharding: Sharding
) -> Iterator[tuple[str, str]]:
    """The sets of ranks that have a parameter, or a shard of it, alike, and its name there."""
    component = part_of(name, "llm")
    if component not in sharding.sharded:
        yield part_of(name, llm_part(mesh)), name
        tied = module.tied_copies
        original = tied.get(name, name)
        if original in tied.values():
            yield f"tied weights, tensor peer {mesh.tp_rank}", original
    elif component != "llm" and sharding.meets(component):  # the same shards in each pipeline
        yield f"{component}, shard of pipeline rank {mesh.pp_rank}, peer {mesh.peer}", name
