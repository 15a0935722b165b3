"""Ends process groups when nobody needs them any more."""

import weakref
from collections.abc import Iterable, Sequence

import torch.distributed as dist

Group = dist.ProcessGroup


def destroy_with(owner: object, groups: Iterable[Group]) -> None:
    """Destroy these process groups, with their threads and connections, once nobody has `owner` any more."""
    weakref.finalize(owner, _destroy, list({id(group): group for group in groups}.values())).atexit = False


def _destroy(groups: Sequence[Group]) -> None:
    for group in groups:
        if dist.is_initialized() and group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)
