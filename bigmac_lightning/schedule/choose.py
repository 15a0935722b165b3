"""Compares plans of different policies, backbones and group sizes, and chooses the fastest one within the limits.

The same request gives the same choice in every process, so all ranks of a pipeline choose the same plan. The makespans
of different backbones can be compared, because the costs of F, B, I and W are those of all stages of a rank together,
and because the ideal is always that of plain 1F1B.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from bigmac_lightning.schedule.backbones import BACKBONES, get_backbone
from bigmac_lightning.schedule.budget import size_text
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.placing.policies import get_policy
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.request import Auto, PlanRequest, ScheduleOptions

SHOWN = 5
"""Number of candidates that ``Choice.reason`` describes; chosen so that the text stays short."""


def ideal_makespan(request: PlanRequest) -> float:
    """Return the makespan of the bare 1F1B backbone plus the nested work's time divided by the number of ranks."""
    size, microbatches = request.pipeline_parallel_size, request.microbatches
    return make_plan(ScheduleOptions(costs=request.costs).request(size, microbatches, workload=request.workload)).ideal


@dataclass(frozen=True)
class Candidate:
    """One combination of options, with its plan.

    Attributes:
        policy, backbone, virtual_stages, group_size: the options, as in ``ScheduleOptions``.
        plan: the plan; ``None`` if these options give none.
        problem: the reason why there is no plan; empty if there is one.
        memory: per rank, the peak of the memory in use, in bytes; empty without a ``MemoryBudget``.
        seconds: time that planning took, in seconds.
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
        """The key that sorts candidates: by makespan; at equal makespans by fewer stages per rank, then by groups
        nearer to P microbatches, then by fewer live encoder units and LLM microbatches. Candidates without a plan come
        last.

        Makespans are rounded to nine digits, because rounding errors of the simulation must not decide.
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
    """The result of a comparison.

    Attributes:
        best: the fastest candidate, which has a plan.
        candidates: all candidates, the fastest first and those without a plan last.
    """

    best: Candidate
    candidates: tuple[Candidate, ...]

    def among(self, possible: Callable[[Plan], bool], otherwise: str) -> "Choice":
        """The choice among those candidates whose plans are possible.

        Args:
            otherwise: why the others are refused.

        Raises:
            ValueError: none is.
        """
        marked = [
            replace(candidate, plan=None, problem=otherwise)
            if candidate.plan is not None and not possible(candidate.plan)
            else candidate
            for candidate in self.candidates
        ]
        ordered = sorted(marked, key=lambda candidate: candidate.order)
        return _chosen(ordered, f"policy {self.best.policy!r}")

    @property
    def reason(self) -> str:
        """A few lines of text that give the fastest candidates with their makespans and peaks, and the refused ones."""
        made = [candidate for candidate in self.candidates if candidate.plan is not None]
        refused = [candidate for candidate in self.candidates if candidate.plan is None]
        lines = [f"chosen for policy {self.best.policy}: {self.best}; the fastest of {len(made)}:"]
        lines += [f"  {candidate}: {_result_text(candidate)}" for candidate in made[:SHOWN]]
        if len(made) > SHOWN:
            lines.append(f"  and {len(made) - SHOWN} more, the last {made[-1]}: {_result_text(made[-1])}")
        lines += [f"  refused: {candidate}: {candidate.problem}" for candidate in refused[:SHOWN]]
        if len(refused) > SHOWN:
            lines.append(f"  and {len(refused) - SHOWN} more refused")
        return "\n".join(lines)


def choose(request: PlanRequest) -> Choice:
    """Choose the fastest plan within the limits, over all values of the options that are "auto".

    Raises:
        ValueError: no plan is possible within the limits; the message gives the reason for each candidate.
    """
    stages = request.virtual_stages
    if stages is None:
        stages = "auto" if request.backbone == "auto" else request.stages_per_rank
    backbones = list(BACKBONES) if request.backbone == "auto" else [request.backbone]
    found = candidates(request, [request.policy], backbones, "auto" if stages == "auto" else [stages])
    return _chosen(found, f"backbone {request.backbone!r} and policy {request.policy!r}")


def _chosen(found: Sequence[Candidate], options: str) -> Choice:
    if found[0].plan is None:
        problems = "".join(f"\n  {candidate}: {candidate.problem}" for candidate in found)
        raise ValueError(f"{options} give no plan that is possible:{problems}")
    return Choice(found[0], tuple(found))


def candidates(
    request: PlanRequest, policies: Sequence[str], backbones: Sequence[str], virtual_stages: Sequence[int] | Auto
) -> list[Candidate]:
    """Plan every combination of the given options. The fastest comes first; those without a plan come last.

    Args:
        request: all other options. If its `group_size` is "auto", groups of P, P / 2 and 2 P microbatches are tried.
        policies: names of policies.
        backbones: names or files of backbones.
        virtual_stages: numbers of stages per rank to try. "auto" tries 2 and 4 where the backbone allows them, and
            otherwise the smallest number that it allows.

    Raises:
        ValueError: a name is unknown.
    """
    found: list[Candidate] = []
    for backbone, policy in product(backbones, policies):
        numbers, sizes = _numbers_of_stages(backbone, virtual_stages), _group_sizes(request, policy)
        found += [_make(request, policy, backbone, number, size) for number, size in product(numbers, sizes)]
    return sorted(found, key=lambda candidate: candidate.order)


def _numbers_of_stages(backbone: str, virtual_stages: Sequence[int] | Auto) -> list[int]:
    allowed = get_backbone(backbone).virtual_stages
    if virtual_stages != "auto":
        return [number for number in virtual_stages if isinstance(number, int)]
    return [number for number in (2, 4) if number in allowed] or [allowed[0]]


def _group_sizes(request: PlanRequest, policy: str) -> list[int]:
    if not get_policy(policy).spread:
        return [1]
    size = request.pipeline_parallel_size
    if request.group_size != "auto":
        return [request.group_size or size]
    return [size, *(other for other in (size // 2, 2 * size) if 1 <= other <= request.microbatches)]


def _make(request: PlanRequest, policy: str, backbone: str, virtual_stages: int, group_size: int) -> Candidate:
    """Return a candidate with its plan, or with the reason why there is none."""
    candidate, begin = Candidate(policy, backbone, virtual_stages, group_size), time.perf_counter()
    try:
        _check_layers(request, virtual_stages)
        one = replace(request, policy=policy, backbone=backbone, virtual_stages=virtual_stages, group_size=group_size)
        plan = make_plan(one)
    except ValueError as problem:
        return replace(candidate, problem=str(problem).splitlines()[0])
    memory = request.memory.peaks(plan, request.workload) if request.memory else ()
    return replace(candidate, plan=plan, memory=tuple(memory), seconds=time.perf_counter() - begin)


def _check_layers(request: PlanRequest, virtual_stages: int) -> None:
    """Raise ``ValueError`` if the LLM's layers cannot be cut into this many stages per rank."""
    stages, layers = request.pipeline_parallel_size * virtual_stages, request.layers
    if layers is not None and stages > layers:
        raise ValueError(f"{stages} stages are more than the LLM's {layers} layers")
    if layers is not None and virtual_stages > 1 and layers % stages:
        raise ValueError(f"the LLM's {layers} layers cannot be divided into {stages} stages of the same size")


def _result_text(candidate: Candidate) -> str:
    """Return a text with the makespan and the peaks of a candidate, which must have a plan."""
    plan = candidate.plan
    assert plan is not None
    units, microbatches = (max(plan.peak[key], default=0.0) for key in ("encoder_units", "llm_microbatches"))
    text = f"makespan {plan.makespan:g}, at most {units:.3g} encoder units and {microbatches:g} LLM microbatches"
    return f"{text}, {size_text(max(candidate.memory))}" if candidate.memory else text
