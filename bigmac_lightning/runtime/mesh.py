"""The processes of a run as a (dp, pp) mesh, and the process groups for messages and gradients."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from bigmac_lightning.runtime.lowering import MESSAGE_KINDS, MessageKind

Group = dist.ProcessGroup


@dataclass(frozen=True)
class PipelineMesh:
    """The mesh as one process sees it. It has dp pipelines of pp ranks each.

    Attributes:
        device: device on which this process computes.
        mesh: the DeviceMesh with dimensions "dp" and "pp". Consecutive global ranks form a pipeline.
        pp_ranks: global rank of each pipeline rank of this process's pipeline.
        channels: process groups of this pipeline by (kind of message, whether it goes to a higher pipeline rank). With
            separate groups, no message waits for one of another kind or direction. Empty if pp is 1.
        tied_group: process group of the first and the last stage's ranks of all pipelines; ``None`` on other ranks, or
            if pp is 1.
        tied_pair: process group of the first and the last stage's ranks of this pipeline; likewise.
        host_group: process group of this pipeline for objects on the CPU (gloo); ``None`` if pp is 1.
    """

    device: torch.device
    mesh: DeviceMesh
    pp_ranks: tuple[int, ...]
    channels: dict[tuple[MessageKind, bool], Group]
    tied_group: Group | None
    tied_pair: Group | None
    host_group: Group | None = None

    @property
    def pp_size(self) -> int:
        """Number of ranks of a pipeline."""
        return len(self.pp_ranks)

    @property
    def pp_rank(self) -> int:
        """This process's rank in its pipeline."""
        return self.pp_ranks.index(dist.get_rank())

    @property
    def dp_size(self) -> int:
        """Number of pipelines."""
        return self.mesh.size(0)

    @property
    def dp_rank(self) -> int:
        """Number of this process's pipeline."""
        return self.mesh.get_local_rank("dp")

    @property
    def pp_group(self) -> Group:
        """Process group of this process's pipeline."""
        return self.mesh.get_group("pp")

    @property
    def dp_group(self) -> Group:
        """Process group of the processes with the same pipeline rank in all pipelines."""
        return self.mesh.get_group("dp")


def mesh_shape(world_size: int, pipeline_parallel_size: int | str, data_parallel_size: int | str) -> tuple[int, int]:
    """Return (dp, pp). A size that is "auto" becomes the world size divided by the other size; if both are "auto", pp
    is the world size and dp is 1.

    Raises:
        ValueError: the product of the sizes is not the world size.
    """
    pp, dp = pipeline_parallel_size, data_parallel_size
    if pp == "auto":
        pp = world_size if dp == "auto" else world_size // int(dp)
    if dp == "auto":
        dp = world_size // int(pp)
    pp, dp = int(pp), int(dp)
    if pp < 1 or dp < 1 or pp * dp != world_size:
        raise ValueError(
            f"{world_size} processes cannot form pipelines: pipeline_parallel_size={pipeline_parallel_size} x "
            f"data_parallel_size={data_parallel_size} must be {world_size}. Change devices, num_nodes or the sizes."
        )
    return dp, pp


def build_mesh(
    device: torch.device, dp: int, pp: int, stage_rank: Iterable[int], timeout: timedelta | None = None
) -> PipelineMesh:
    """Create the mesh and all its process groups. Collective: every rank of the world must call it with the same
    arguments (apart from `device`).

    Args:
        device: device on which this process computes.
        dp: number of pipelines.
        pp: number of ranks of each pipeline.
        stage_rank: pipeline rank of each stage. The first stage has the embedding, the last stage has the head.
        timeout: timeout of all process groups; by default that of torch.
    """
    rank = dist.get_rank()
    pipelines = [tuple(range(replica * pp, (replica + 1) * pp)) for replica in range(dp)]
    replicas = list(zip(*pipelines, strict=True))
    groups = [_own_group(replicas, timeout), _own_group(pipelines, timeout)]
    mesh = DeviceMesh.from_group(groups, device.type, mesh=[list(p) for p in pipelines], mesh_dim_names=("dp", "pp"))
    stage_rank = list(stage_rank)
    channels: dict[tuple[MessageKind, bool], Group] = {}
    tied_group = tied_pair = host_group = None
    if pp > 1:
        for pipeline in pipelines:
            group = dist.new_group(list(pipeline), timeout=timeout, backend="gloo")
            host_group = group if isinstance(group, Group) else host_group
            for kind, upwards in itertools.product(MESSAGE_KINDS, (True, False)):
                if not _used(kind, upwards, stage_rank, pp):
                    continue
                group = dist.new_group(list(pipeline), timeout=timeout)
                if isinstance(group, Group):  # otherwise this rank is in another pipeline
                    channels[kind, upwards] = group
        owners = sorted({pipeline[r] for pipeline in pipelines for r in (stage_rank[0], stage_rank[-1])})
        group = dist.new_group(owners, timeout=timeout)
        tied_group = tied_pair = group if isinstance(group, Group) else None
        for pipeline in pipelines if dp > 1 else ():
            group = dist.new_group(sorted({pipeline[r] for r in (stage_rank[0], stage_rank[-1])}), timeout=timeout)
            tied_pair = group if isinstance(group, Group) else tied_pair
    return PipelineMesh(device, mesh, pipelines[rank // pp], channels, tied_group, tied_pair, host_group)


def _own_group(ranks: Iterable[Sequence[int]], timeout: timedelta | None) -> Group:
    """Create a process group of each of these lists of ranks, and return the one that this process is in.

    torch requires that all processes create all groups, in the same order.
    """
    made = [dist.new_group(list(members), timeout=timeout) for members in ranks]
    (own,) = (group for group in made if isinstance(group, Group))
    return own


def _used(kind: MessageKind, upwards: bool, stage_rank: Sequence[int], pp: int) -> bool:
    """Whether any message of this kind goes in this direction. Unused process groups would only take memory."""
    ranks = range(pp)
    pairs = {
        "hidden": list(itertools.pairwise(stage_rank)),
        "features": [(rank, stage_rank[0]) for rank in ranks],
        "conditions": [(stage_rank[-1], rank) for rank in ranks],
    }
    name = kind.removesuffix("_grad")
    return any((b > a if name == kind else a > b) == upwards and a != b for a, b in pairs[name])
