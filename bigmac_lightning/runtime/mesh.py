"""The processes of a run as a (dp, pp, cp, tp) mesh, and the process groups for messages and gradients."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from bigmac_lightning.groups import destroy_with
from bigmac_lightning.runtime.lowering import MESSAGE_KINDS, MessageKind

Group = dist.ProcessGroup


@dataclass(frozen=True)
class PipelineMesh:
    """The mesh as one process sees it: dp model replicas, each a pipeline of pp ranks, each of which is a group of cp x
    tp processes (*peers*) that compute its stages together. Consecutive global ranks are tensor peers, then context
    peers, then pipeline ranks, then replicas. Messages go between peers of equal place.

    Attributes:
        device: device on which this process computes.
        mesh: the DeviceMesh with dimensions "dp" and "pp", and with "cp" and "tp" if there are peers.
        pp_ranks: global rank of each pipeline rank, at this process's place among peers.
        replica_ranks: global ranks of this model replica, pipeline rank by pipeline rank.
        channels: process groups of `pp_ranks` by (kind of message, whether it goes to a higher pipeline rank). With
            separate groups, no message waits for one of another kind or direction. Empty if pp is 1.
        data_group: process group of the processes that have the same weights of the LLM: those of equal pipeline and
            tensor place.
        replica_group: process group of this model replica.
        peer_group: process group of the peers; ``None`` if there are none.
        tied_group: process group of the first and the last stage's ranks of all replicas, of equal tensor place;
            ``None`` on other ranks, or if pp is 1.
        tied_pair: process group of the first and the last stage's ranks in `pp_ranks`; likewise.
        host_group: process group of this model replica for objects on the CPU (gloo); ``None`` if it has one rank.
    """

    device: torch.device
    mesh: DeviceMesh
    pp_ranks: tuple[int, ...]
    replica_ranks: tuple[int, ...]
    channels: dict[tuple[MessageKind, bool], Group]
    data_group: Group
    replica_group: Group
    peer_group: Group | None
    tied_group: Group | None
    tied_pair: Group | None
    host_group: Group | None

    # torch makes a new mesh of a dimension at each access, and keeps something of each, so they are accessed once.

    @cached_property
    def pp_size(self) -> int:
        """Number of ranks of a pipeline."""
        return len(self.pp_ranks)

    @cached_property
    def pp_rank(self) -> int:
        """This process's rank in its pipeline."""
        return self.pp_ranks.index(dist.get_rank())

    @cached_property
    def dp_size(self) -> int:
        """Number of model replicas."""
        return self.mesh.size(0)

    @cached_property
    def dp_rank(self) -> int:
        """Number of this process's model replica."""
        return self.mesh.get_local_rank("dp")

    @cached_property
    def peers(self) -> int:
        """Number of processes that compute a stage together."""
        return len(self.replica_ranks) // len(self.pp_ranks)

    @cached_property
    def peer(self) -> int:
        """This process's place among its peers, context by context."""
        return self.replica_ranks.index(dist.get_rank()) % self.peers

    @cached_property
    def tp_size(self) -> int:
        """Number of tensor peers."""
        return self.mesh.size(3) if self.mesh.ndim == 4 else 1

    @cached_property
    def tp_rank(self) -> int:
        """This process's place among its tensor peers."""
        return self.peer % self.tp_size

    @cached_property
    def cp_size(self) -> int:
        """Number of context peers."""
        return self.peers // self.tp_size

    @cached_property
    def cp_rank(self) -> int:
        """Which slice of the rows this process computes."""
        return self.peer // self.tp_size

    @cached_property
    def data_mesh(self) -> DeviceMesh:
        """The mesh of `data_group`, of one dimension."""
        if self.cp_size == 1:
            return self.mesh["dp"]
        return self.mesh["dp", "cp"]._flatten("data")

    @cached_property
    def pp_group(self) -> Group:
        """Process group of this process's pipeline."""
        return self.mesh.get_group("pp")

    @cached_property
    def dp_group(self) -> Group:
        """Process group of the processes with the same place in all model replicas."""
        return self.mesh.get_group("dp")

    @cached_property
    def cp_group(self) -> Group:
        """Process group of the context peers; there are some."""
        return self.mesh.get_group("cp")


def mesh_shape(
    world_size: int, pipeline_parallel_size: int | str, data_parallel_size: int | str, peers: int = 1
) -> tuple[int, int]:
    """Return (dp, pp). A size that is "auto" becomes the number of pipeline ranks divided by the other size; if both
    are "auto", pp is that number and dp is 1.

    Args:
        peers: number of processes of a pipeline rank.

    Raises:
        ValueError: the product of the sizes is not the world size.
    """
    pp, dp, ranks = pipeline_parallel_size, data_parallel_size, world_size // peers
    if pp == "auto":
        pp = ranks if dp == "auto" else ranks // int(dp)
    if dp == "auto":
        dp = ranks // int(pp) if int(pp) else 0
    pp, dp = int(pp), int(dp)
    if pp < 1 or dp < 1 or pp * dp * peers != world_size:
        further = f" x {peers} tensor and context peers" if peers > 1 else ""
        raise ValueError(
            f"{world_size} processes cannot form pipelines: pipeline_parallel_size={pipeline_parallel_size} x "
            f"data_parallel_size={data_parallel_size}{further} must be {world_size}. Change devices, num_nodes or the "
            "sizes."
        )
    return dp, pp


def build_mesh(
    device: torch.device,
    dp: int,
    pp: int,
    stage_rank: Iterable[int],
    timeout: timedelta | None = None,
    cp: int = 1,
    tp: int = 1,
) -> PipelineMesh:
    """Create the mesh and all its process groups. Collective: every rank of the world must call it with the same
    arguments (apart from `device`).

    Args:
        device: device on which this process computes.
        dp: number of model replicas.
        pp: number of ranks of each pipeline.
        stage_rank: pipeline rank of each stage. The first stage has the embedding, the last stage has the head.
        timeout: timeout of all process groups; by default that of torch.
        cp, tp: numbers of context and of tensor peers of each pipeline rank.
    """
    # DTensor remembers results of its operations with their mesh. That of an earlier run in this process is equal to
    # the new one, but its process groups are gone.
    _clear_sharding_prop_cache()
    ranks, stage_rank = torch.arange(dp * pp * cp * tp).view(dp, pp, cp, tp), list(stage_rank)
    make = partial(_own_group, ranks, timeout)
    own = {name: make(name) for name in ("dp", "pp", *(("cp", "tp") if cp * tp > 1 else ()))}
    layout = ranks if cp * tp > 1 else ranks.view(dp, pp)
    mesh = DeviceMesh.from_group(list(own.values()), device.type, mesh=layout, mesh_dim_names=tuple(own))
    data, replica, peer_group = own["dp"], own["pp"], None
    if cp * tp > 1:
        data = make("dp", "cp") if cp > 1 else data
        replica, peer_group = make("pp", "cp", "tp"), make("cp", "tp")
    channels: dict[tuple[MessageKind, bool], Group] = {}
    tied_group = tied_pair = None
    if pp > 1:
        for kind, upwards in itertools.product(MESSAGE_KINDS, (True, False)):
            if _used(kind, upwards, stage_rank, pp):
                channels[kind, upwards] = make("pp")
        ends = sorted({stage_rank[0], stage_rank[-1]})
        if len(ends) > 1:
            tied_group = _own_or_none(_lists(ranks[:, ends], "dp", "pp", "cp"), timeout)
            tied_pair = tied_group if dp * cp == 1 else _own_or_none(_lists(ranks[:, ends], "pp"), timeout)
    host_group = make("pp", "cp", "tp", backend="gloo") if pp * cp * tp > 1 else None
    place = (ranks == dist.get_rank()).nonzero()[0].tolist()
    found = PipelineMesh(
        device,
        mesh,
        tuple(ranks[place[0], :, place[2], place[3]].tolist()),
        tuple(ranks[place[0]].flatten().tolist()),
        channels,
        data,
        replica,
        peer_group,
        tied_group,
        tied_pair,
        host_group,
    )
    others = (data, replica, peer_group, tied_group, tied_pair, host_group)
    # Shards and slices of weights may live longer than the mesh of the pipeline; they have the DeviceMesh.
    destroy_with(mesh, [*own.values(), *channels.values(), *(group for group in others if group is not None)])
    return found


DIMENSIONS = ("dp", "pp", "cp", "tp")


def _lists(ranks: Tensor, *dimensions: str) -> list[list[int]]:
    """The lists of global ranks that differ in these dimensions only."""
    inside = [DIMENSIONS.index(name) for name in dimensions]
    outside = [d for d in range(4) if d not in inside]
    size = math.prod(ranks.shape[d] for d in inside)
    return [sorted(row) for row in ranks.permute(*outside, *inside).reshape(-1, size).tolist()]


def _own_group(ranks: Tensor, timeout: timedelta | None, *dimensions: str, backend: str | None = None) -> Group:
    """Create the process groups of ranks that differ in these dimensions, and return the one that this process is
    in."""
    own = _own_or_none(_lists(ranks, *dimensions), timeout, backend)
    assert own is not None
    return own


def _own_or_none(lists: list[list[int]], timeout: timedelta | None, backend: str | None = None) -> Group | None:
    """Create a process group of each of these lists of ranks, and return the one that this process is in, if any.

    torch requires that all processes create all groups, in the same order.
    """
    made = [dist.new_group(members, timeout=timeout, backend=backend) for members in lists]
    return next((group for group in made if isinstance(group, Group)), None)


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
