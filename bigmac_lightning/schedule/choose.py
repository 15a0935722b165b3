"""Compares plans of different policies, backbones and group sizes, and picks the fastest within the caps.

Knows how to make plans and what makes one better than another; gives the same for the same arguments everywhere, so
that all ranks of a pipeline pick alike. Knows nothing of terminals or models.

So that plans compare, F, B, I and W are here the times of all the stages of a rank together, each of V stages taking
1 / V of them; and the ideal is always that of plain 1F1B.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from bigmac_lightning.schedule.backbones import BACKBONES, get_backbone
from bigmac_lightning.schedule.budget import MemoryBudget, size_text
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.make import get_policy, make_plan
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.workload import Workload

Auto = Literal["auto"]

SHOWN = 5
"""So many candidates ``Choice.reason`` tells of."""


@dataclass(frozen=True)
class Case:
    """What plans are made for.

    Attributes:
        pipeline_parallel_size: number of ranks, P.
        microbatches: number of microbatches, M.
        costs: times of the actions; F, B, I and W are those of all the stages of a rank together.
        workload: the work of each microbatch, where they differ.
        max_encoder_units, max_llm_microbatches, memory: the caps; see ``make_plan``.
        layers: of the LLM; more stages than that, or several per rank that differ in size, are no candidates.
    """

    pipeline_parallel_size: int
    microbatches: int
    costs: Costs
    workload: Workload | None = None
    max_encoder_units: float | None = None
    max_llm_microbatches: float | None = None
    memory: MemoryBudget | None = None
    layers: int | None = None

    def ideal(self) -> float:
        """Makespan of the bare 1F1B, and the nested work spread evenly over the ranks."""
        size, microbatches = self.pipeline_parallel_size, self.microbatches
        return make_plan(
            pipeline_parallel_size=size, microbatches=microbatches, costs=self.costs, workload=self.workload
        ).ideal


@dataclass(frozen=True)
class Candidate:
    """One way to plan.

    Attributes:
        policy, backbone, virtual_stages, group_size: arguments of ``make_plan``.
        plan: what came of it; ``None`` if nothing.
        problem: why there is no plan; empty if there is one.
        memory: per rank, the peak bytes; empty without a ``MemoryBudget``.
        seconds: how long planning took.
    """

    policy: str
    backbone: str
    virtual_stages: int
    group_size: int
    plan: Plan | None = None
    problem: str = ""
    memory: tuple[float, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        stages = f" with {self.virtual_stages} stages per rank" if self.virtual_stages > 1 else ""
        return f"{self.backbone}{stages}, group_size {self.group_size}"

    @property
    def order(self) -> tuple[float, ...]:
        """What is sorted by: the fastest first; at equal times fewer stages, then groups of P, then less memory.

        Times are rounded, so that errors of rounding decide nothing.
        """
        if self.plan is None:
            return (float("inf"),)
        plan, peak = self.plan, self.plan.peak
        return (
            float(f"{plan.makespan:.9g}"),
            self.virtual_stages,
            abs(self.group_size - plan.pipeline_parallel_size),
            max(peak["encoder_units"], default=0.0),
            max(peak["llm_microbatches"], default=0.0),
        )


@dataclass(frozen=True)
class Choice:
    """The fastest candidate within the caps, and all others.

    Attributes:
        best: has a plan.
        candidates: all of them, the best first, those without a plan last.
    """

    best: Candidate
    candidates: tuple[Candidate, ...]

    @property
    def reason(self) -> str:
        """Why this one: a few lines with the fastest candidates, their makespans and peaks, and what was refused."""
        made = [candidate for candidate in self.candidates if candidate.plan is not None]
        refused = [candidate for candidate in self.candidates if candidate.plan is None]
        lines = [f"chosen for policy {self.best.policy}: {self.best}; the fastest of {len(made)}:"]
        lines += [f"  {candidate}: {_told(candidate)}" for candidate in made[:SHOWN]]
        if len(made) > SHOWN:
            lines.append(f"  and {len(made) - SHOWN} more, the last {made[-1]}: {_told(made[-1])}")
        lines += [f"  refused: {candidate}: {candidate.problem}" for candidate in refused[:SHOWN]]
        if len(refused) > SHOWN:
            lines.append(f"  and {len(refused) - SHOWN} more refused")
        return "\n".join(lines)


def choose(
    case: Case,
    policy: str = "nested",
    backbone: str = "auto",
    virtual_stages: int | Auto | None = None,
    group_size: int | Auto | None = None,
) -> Choice:
    """The fastest plan within the caps; whatever is "auto" is tried out.

    Args:
        case: what plans are made for.
        policy: by name.
        backbone: by name, or "auto": all that are built in.
        virtual_stages: stages per rank, or "auto"; ``None``: "auto" if the backbone is, and otherwise as few
            as it allows.
        group_size: microbatches per group, or "auto"; ``None``: P.

    Raises:
        ValueError: if there is no plan within the caps, with the reason of each candidate; or a name is unknown.
    """
    if virtual_stages is None:
        virtual_stages = "auto" if backbone == "auto" else get_backbone(backbone).virtual_stages[0]
    numbers: Auto | list[int] = [virtual_stages] if isinstance(virtual_stages, int) else "auto"
    tried = candidates(case, [policy], list(BACKBONES) if backbone == "auto" else [backbone], numbers, group_size)
    if tried[0].plan is None:
        problems = "".join(f"\n  {candidate}: {candidate.problem}" for candidate in tried)
        raise ValueError(f"backbone {backbone!r} and policy {policy!r} give no plan that is possible:{problems}")
    return Choice(tried[0], tuple(tried))


def candidates(
    case: Case,
    policies: Sequence[str],
    backbones: Sequence[str],
    virtual_stages: Sequence[int] | Auto = "auto",
    group_size: int | Auto | None = None,
) -> list[Candidate]:
    """All combinations, the fastest first; those without a plan come last and say why.

    Args:
        case: what plans are made for.
        policies, backbones: by name.
        virtual_stages: numbers of stages per rank to try; "auto": what the backbone needs, or 2 and 4 if it takes any.
        group_size: microbatches per group; "auto": P, half and twice of it; ``None``: P. Policies that do not group
            take 1.

    Raises:
        ValueError: if a name is unknown.
    """
    found: list[Candidate] = []
    for backbone, policy in product(backbones, policies):
        numbers, sizes = _numbers_of_stages(backbone, virtual_stages), _group_sizes(case, policy, group_size)
        found += [_make(case, policy, backbone, number, size) for number, size in product(numbers, sizes)]
    return sorted(found, key=lambda candidate: candidate.order)


def _numbers_of_stages(backbone: str, virtual_stages: Sequence[int] | Auto) -> list[int]:
    allowed = get_backbone(backbone).virtual_stages
    if virtual_stages != "auto":
        return [number for number in virtual_stages if isinstance(number, int)]
    return [number for number in (2, 4) if number in allowed] or [allowed[0]]


def _group_sizes(case: Case, policy: str, group_size: int | Auto | None) -> list[int]:
    if not get_policy(policy).spread:
        return [1]
    size = case.pipeline_parallel_size
    if group_size != "auto":
        return [size if group_size is None else group_size]
    return [size, *(other for other in (size // 2, 2 * size) if 1 <= other <= case.microbatches)]


def _make(case: Case, policy: str, backbone: str, virtual_stages: int, group_size: int) -> Candidate:
    """A candidate with its plan, or with what is wrong."""
    candidate, begin = Candidate(policy, backbone, virtual_stages, group_size), time.perf_counter()
    try:
        _check_layers(case, virtual_stages)
        plan = make_plan(
            policy=policy,
            backbone=backbone,
            pipeline_parallel_size=case.pipeline_parallel_size,
            microbatches=case.microbatches,
            group_size=group_size,
            costs=case.costs.per_stage(virtual_stages),
            virtual_stages=virtual_stages,
            workload=case.workload,
            max_encoder_units=case.max_encoder_units,
            max_llm_microbatches=case.max_llm_microbatches,
            memory=case.memory,
        )
    except ValueError as problem:
        return replace(candidate, problem=str(problem).splitlines()[0])
    memory = case.memory.peaks(plan, case.workload) if case.memory else ()
    return replace(candidate, plan=plan, memory=tuple(memory), seconds=time.perf_counter() - begin)


def _check_layers(case: Case, virtual_stages: int) -> None:
    stages = case.pipeline_parallel_size * virtual_stages
    if case.layers is not None and stages > case.layers:
        raise ValueError(f"{stages} stages are more than the LLM's {case.layers} layers")
    if case.layers is not None and virtual_stages > 1 and case.layers % stages:
        raise ValueError(f"the LLM's {case.layers} layers do not make {stages} stages of the same size")


def _told(candidate: Candidate) -> str:
    """Makespan and peaks of a candidate that has a plan."""
    plan = candidate.plan
    assert plan is not None
    units, microbatches = (max(plan.peak[key], default=0.0) for key in ("encoder_units", "llm_microbatches"))
    text = f"makespan {plan.makespan:g}, at most {units:.3g} encoder units and {microbatches:g} LLM microbatches"
    return f"{text}, {size_text(max(candidate.memory))}" if candidate.memory else text
