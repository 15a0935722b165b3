"""Weights in shards are on their way before the nested action that needs them begins."""

from collections import Counter
from functools import partial
from itertools import pairwise

import torch

from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.training.options import PipelineOptions, ShardingOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.ranks import run_ranks
from tests.toy import ToyModule, split_layers, toy_batch


def _starts(rank: int) -> tuple[Counter[str], Counter[str]]:
    """How often the weights of an encoder or a generator were on their way when it started; and the number of nested
    actions after one of the LLM, by kind."""
    options = PipelineOptions(sharding=ShardingOptions("fsdp", "fsdp"))
    mesh, module = build_mesh(torch.device("cpu"), 1, 2, [0, 1]), ToyModule()
    module.part = part_of(rank, split_layers(4, 2), [0, 1])
    module.configure_model()
    runner = PipelineRunner(module, mesh, options)
    found = Counter[str]()
    for name, sharded in runner.sharding.sharded.items():
        first, *_, last, _ = [part._get_fsdp_state()._fsdp_param_groups for part in sharded._by_themselves]

        def note(*_: object, kind: str = "EF" if name.startswith("enc") else "G", groups: list = first) -> None:
            found[kind] += all(group._all_gather_result is not None for group in groups)

        sharded.module.register_forward_pre_hook(note, prepend=True)
        if name.startswith("enc"):
            sharded.module.register_full_backward_pre_hook(partial(note, kind="EB", groups=last), prepend=True)
    runner(toy_batch(8, runner.layout), "train")
    assert runner.last_plan is not None
    expected = Counter[str]()
    for before, action in pairwise(runner.last_plan.ranks[rank]):
        expected[action.kind] += action.kind in ("EF", "EB", "G") and not before.nested
    return +found, +expected


def test_nested_actions_find_their_weights_on_the_way() -> None:
    for found, expected in run_ranks(2, _starts):
        assert found == expected
        assert set(found) == {"EB", "G"}  # here, each EF but the first comes right after an EB
