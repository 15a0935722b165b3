"""The process groups of a run: those that a process is in, and no others."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from bigmac_lightning.runtime.mesh import build_mesh
from tests.ranks import run_ranks


def _groups(rank: int, dp: int, pp: int, stage_rank: list[int]) -> tuple[int, dict[str, list[int]]]:
    created, new_group = 0, dist.new_group

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal created
        created += 1
        return new_group(*args, **kwargs)

    dist.new_group = counted
    mesh = build_mesh(torch.device("cpu"), dp, pp, stage_rank)
    dist.new_group = new_group
    groups: dict[str, Any] = {
        "dp": mesh.dp_group,
        "pp": mesh.pp_group,
        "host": mesh.host_group,
        "tied": mesh.tied_group,
    }
    groups |= {f"{kind} {upwards}": group for (kind, upwards), group in mesh.channels.items()}
    for group in groups.values():  # each works, and only with its members
        if group is not None:
            total = torch.tensor([rank])
            dist.all_reduce(total, group=group)
            assert total.item() == sum(dist.get_process_group_ranks(group))
    assert (mesh.dp_rank, mesh.pp_rank) == divmod(rank, pp)
    assert (mesh.dp_size, mesh.pp_size) == (dp, pp)
    return created, {n: dist.get_process_group_ranks(g) for n, g in groups.items() if g is not None}


@pytest.mark.parametrize(("dp", "pp", "stage_rank"), [(1, 2, [0, 1]), (2, 2, [0, 1]), (2, 3, [0, 1, 2]), (3, 1, [0])])
def test_a_process_creates_only_its_own_groups(dp: int, pp: int, stage_rank: list[int]) -> None:
    for rank, (created, groups) in enumerate(run_ranks(dp * pp, _groups, dp, pp, stage_rank)):
        replica, place = divmod(rank, pp)
        pipeline = list(range(replica * pp, (replica + 1) * pp))
        assert created == len(groups), "a group of which this process is no member"
        assert groups.pop("dp") == list(range(place, dp * pp, pp))
        tied = groups.pop("tied", None)
        assert tied == (
            sorted({p * pp + r for p in range(dp) for r in (0, pp - 1)}) if pp > 1 and place in (0, pp - 1) else None
        )
        assert all(members == pipeline for members in groups.values())
