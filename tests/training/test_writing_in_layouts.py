"""Texts that a module writes by the stages of a pipeline: token for token those of one process, in every layout."""

from functools import cache
from typing import Any

import pytest

from bigmac_lightning import ShardingOptions
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer
from tests.training.writers import MODELS, written

Case = tuple[str, str, dict[str, Any]]
"""The model, the precision, and the arguments of the strategy."""

INTERLEAVED = {"backbone": "interleaved_1f1b", "virtual_stages": 2}
ZBV = {"backbone": "zbv", "virtual_stages": 2}
ALL_FSDP = {"sharding": ShardingOptions("fsdp", "fsdp", "fsdp"), "microbatches": 2}
ALL_ZERO = {"sharding": ShardingOptions("zero1", "zero1", "zero1", offload=("encoders", "stages"))}

NARROW: list[tuple[int, Case]] = [
    (2, ("pictures", "32-true", INTERLEAVED)),
    (2, ("pictures", "bf16-mixed", ZBV)),
    (2, ("pictures", "32-true", {"sharding": ShardingOptions(encoders="fsdp")})),
    (2, ("qwen3_vl", "32-true", INTERLEAVED)),
    (2, ("states", "32-true", INTERLEAVED)),
    (2, ("images attended to", "32-true", INTERLEAVED)),
    (3, ("shared keys", "32-true", {})),
    (2, ("half a cache", "32-true", {})),
    (2, ("toy", "32-true", ZBV)),
    (3, ("pictures", "bf16-true", {})),
    (3, ("toy", "32-true", {"policy": "disaggregated"})),
    (4, ("pictures", "32-true", {"data_parallel_size": 2})),
    (4, ("qwen3_vl", "32-true", {"context_parallel_size": 2})),
    (4, ("experts", "32-true", {"tensor_parallel_size": 2, "expert_parallel_size": 2})),
]
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [{}, INTERLEAVED, ZBV, {"tensor_parallel_size": 2}, {"context_parallel_size": 2}, {"data_parallel_size": 2}],
    3: [{}, {"policy": "disaggregated"}, {"policy": "first_stage"}],
    4: [
        {"data_parallel_size": 2},
        {"data_parallel_size": 2, **ALL_FSDP},
        {"data_parallel_size": 2, **ALL_ZERO},
        {"tensor_parallel_size": 2},
        {"context_parallel_size": 2, **ALL_FSDP},
        {**INTERLEAVED, "tensor_parallel_size": 2},
    ],
}


@cache
def _alone(name: str, precision: Any) -> dict[int, list[list[int]]]:
    return written(plain_trainer(precision=precision), name)


def _on_rank(rank: int, world: int, cases: list[Case]) -> list[Any]:
    found = []
    for name, precision, strategy in cases:
        try:
            found.append(written(pipeline_trainer(world, strategy, precision=precision), name))
        except ValueError as error:
            found.append(str(error))
    return found


def _check(world: int, cases: list[Case]) -> list[str]:
    """Compares each case, and returns why others are refused."""
    refused, by_rank = [], on_ranks(world, _on_rank, world, cases)
    for (name, precision, strategy), *ranks in zip(cases, *by_rank, strict=True):
        if isinstance(ranks[0], str):
            refused.append(ranks[0])
            continue
        expected, seen = _alone(name, precision), set[int]()
        for found in ranks:
            seen |= found.keys()
            for number, tokens in found.items():
                assert tokens == expected[number], (name, precision, strategy, number)
        assert seen == expected.keys()
    return refused


def test_prompts_tell_layouts_apart() -> None:
    """Texts are not all alike, and some end before others."""
    for name in ("pictures", "qwen3_vl", "toy", "states", "images attended to", "shared keys"):
        found = [tokens for both in _alone(name, "32-true").values() for tokens in both]
        assert len({tuple(tokens) for tokens in found}) > len(found) / 2, name
        assert max(len({*tokens}) for tokens in found) > 2, name
    assert len({len(tokens) for both in _alone("pictures", "32-true").values() for tokens in both}) > 1


@pytest.mark.parametrize(("world", "case"), NARROW, ids=lambda value: value[0] if isinstance(value, tuple) else None)
def test_as_in_one_process(world: int, case: Case) -> None:
    assert not _check(world, [case])


@pytest.mark.wide
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("world", LAYOUTS)
def test_everywhere(world: int, name: str) -> None:
    precisions = ["32-true", "bf16-mixed", "bf16-true"] if name == "pictures" else ["32-true"]
    parallel = {"tensor_parallel_size", "context_parallel_size"}
    for layout in LAYOUTS[world]:
        # sums of ranks are rounded otherwise than in one process, which with 16 bits gives other tokens
        exact = precisions[:1] if parallel & layout.keys() else precisions
        for reason in _check(world, [(name, precision, layout) for precision in exact]):
            assert name not in ("pictures", "experts"), reason
            assert "parallel" in reason or "tensor=" in reason or "ddp" in reason, reason
