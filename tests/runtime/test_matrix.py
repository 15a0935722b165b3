"""A few of the random combinations of `matrix`, which runs as many as one likes by hand."""

from dataclasses import fields, replace
from typing import Any

import pytest
from torch import nn

from bigmac_lightning.training.options import PipelineOptions
from tests.runtime import matrix

CASES = matrix.cases(60)
# Pipelines that gather the LLM's weights together, of which one or both have no loss.
(WITH_FSDP, *_) = (case for case in CASES if case.options.sharding.stages == "fsdp" and case.dp == 2)
NOTHING, ALL = ("nothing", "nothing"), ("all", "text")
CASES.append(replace(WITH_FSDP, seed=len(CASES), kinds=((NOTHING, NOTHING), (NOTHING, ALL), (ALL, NOTHING))))


@pytest.fixture(scope="module")
def found() -> dict[int, list[str]]:
    return matrix.run(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.seed}-P{case.pp}-dp{case.dp}")
def test_against_one_process(case: matrix.Case, found: dict[int, list[str]]) -> None:
    assert not found[case.seed], case


def test_cases_cover_what_they_name() -> None:
    assert {case.options.schedule.backbone for case in CASES} == set(matrix.BACKBONES)
    assert {case.options.schedule.policy for case in CASES} == set(matrix.POLICIES)
    kinds = {kind for case in CASES for step in case.kinds for replica in step for kind in replica}
    assert kinds == set(matrix.KINDS)
    assert {kind for case in CASES for kind in case.options.sharding.offload} == {"encoders", "generators", "stages"}
    assert any(case.tied for case in CASES)
    assert any(case.checkpointed for case in CASES)
    assert {name for case in CASES for name, _ in case.adapters} >= {"llm", "encoders.image", "generators.drawing"}


class _Sharing(matrix.AdaptedModule):
    """The image encoder ends with a weight of the LLM."""

    def adapt(self) -> None:
        super().adapt()
        encoder: Any = self.encoders["image"]
        encoder.projector = nn.Sequential(encoder.projector, self.llm.layers["0"].mix)


class _SharingCase(matrix.Case):
    def module(self) -> matrix.AdaptedModule:
        return _Sharing(self.layers, self.tied, (), {})


def test_a_weight_that_components_have_together() -> None:
    """Its gradient is there only when the last of them is done."""
    (given, *_) = (case for case in CASES if case.pp == 1 and case.dp == 2 and not case.owner_costs)
    values = {entry.name: getattr(given, entry.name) for entry in fields(given)}
    case = _SharingCase(
        **{**values, "options": PipelineOptions(), "adapters": (), "frozen": ((),) * matrix.STEPS}
        | {"kinds": ((("text", "all"),) * 2,) * matrix.STEPS}
    )
    assert not matrix.run([case])[case.seed]
