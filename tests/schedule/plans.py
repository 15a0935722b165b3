"""Random plans, and references that restate the rules in another way than the package does."""

from collections import defaultdict
from typing import Any

from hypothesis import strategies as st

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.backbones import BACKBONES
from bigmac_lightning.schedule.dataflow import Dataflow
from bigmac_lightning.schedule.plan import Costs, Plan
from bigmac_lightning.schedule.simulate import Timeline, durations

STAGES_PER_RANK = {
    name: [stages for stages in (1, 2, 3) if stages in backbone.virtual_stages] for name, backbone in BACKBONES.items()
}
POLICIES = ("nested", "upfront", "first_stage", "recompute", "disaggregated")
TIMES = [0.3, 0.7, 1.0, 2.0, 4.1]


@st.composite
def plan_arguments(draw: st.DrawFn, latency: bool = False, policies: tuple[str, ...] = POLICIES) -> dict[str, Any]:
    """Arguments of make_plan: small, with unequal costs and shares, also zero shares and groups without work."""
    policy = draw(st.sampled_from(policies))
    backbone = draw(st.sampled_from(sorted(BACKBONES)))
    stages = draw(st.sampled_from(STAGES_PER_RANK[backbone]))
    size, microbatches = draw(st.integers(1, 6)), draw(st.integers(1, 20))
    before = after = 0
    if policy == "disaggregated":
        before, after = draw(st.integers(1, 2)), draw(st.integers(1, 2))
        size += before + after
    llm_rank = [before + rank for rank in BACKBONES[backbone].stage_rank(size - before - after, stages)]
    group_size = draw(st.integers(1, 8)) if policy != "first_stage" else 1
    costs = Costs(
        F=draw(st.sampled_from(TIMES)),
        B=draw(st.sampled_from([0.0, *TIMES])),
        I=draw(st.sampled_from(TIMES)),
        W=draw(st.sampled_from(TIMES)),
        EF=draw(st.sampled_from([0.0, *TIMES])),
        EB=draw(st.sampled_from([0.0, *TIMES])),
        G=draw(st.sampled_from([0.0, *TIMES])),
        latency=draw(st.sampled_from([0.0, 0.1, 1.0, 7.0])) if latency else 0.0,
    )
    groups = -(-microbatches // group_size)

    def shares(only_rank: int, own_ranks: range) -> list[list[float]]:
        if policy == "first_stage":
            rows = [
                [draw(st.sampled_from([0, 1])) * (rank == only_rank) for rank in range(size)] for _ in range(groups)
            ]
        else:
            weights = st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=size, max_size=size)
            rows = [draw(weights) for _ in range(groups)]
            if policy == "disaggregated":
                rows = [[weight * (rank in own_ranks) for rank, weight in enumerate(row)] for row in rows]
        return [[share / sum(row) if any(row) else 0.0 for share in row] for row in rows]

    return {
        "policy": policy,
        "backbone": backbone,
        "virtual_stages": stages,
        "pipeline_parallel_size": size,
        "microbatches": microbatches,
        "group_size": group_size,
        "costs": costs,
        "stage_rank": llm_rank if policy == "disaggregated" else None,
        "encoder_shares": shares(0, range(before)) if costs.EF and draw(st.booleans()) else None,
        "generator_shares": shares(llm_rank[-1], range(size - after, size))
        if costs.G and draw(st.booleans())
        else None,
    }


def reference_ends(plan: Plan) -> dict[tuple[int, str], float]:
    """End time of every (rank, action text): polls the ranks, with the dependencies restated on texts."""
    where = {
        str(action): rank for rank, actions in enumerate(plan.ranks) for action in actions if action.stage is not None
    }
    owners = defaultdict(list)
    for rank, actions in enumerate(plan.ranks):
        for action in actions:
            if action.nested:
                owners[str(action)].append(rank)
    group_of = {m: g for g, group in enumerate(plan.groups) for m in group}
    last = plan.stages - 1

    def backward(stage: int, microbatch: int) -> str:
        return next(text for kind in "BI" if (text := f"{stage}{kind}{microbatch}") in where)

    def needs(rank: int, action: Action) -> list[tuple[int, str]]:
        kind, index, stage = action.kind, action.index, action.stage
        texts: list[str] = []
        found: list[tuple[int, str]] = []
        if stage is not None and kind == "F":
            texts += [f"{stage - 1}F{index}"] * (stage > 0)
            found += [(r, f"EF{group_of[index]}") for r in owners[f"EF{group_of[index]}"] if stage == 0]
        elif stage is not None and kind == "W":
            texts.append(f"{stage}I{index}")
        elif stage is not None:
            texts += [f"{stage}F{index}"] + [backward(stage + 1, index) for _ in range(stage < last)]
            found += [(r, f"G{group_of[index]}") for r in owners[f"G{group_of[index]}"] if stage == last]
        elif kind == "G":
            texts += [f"{last}F{m}" for m in plan.groups[index]]
        elif kind == "EB":
            texts += [backward(0, m) for m in plan.groups[index]]
            found.append((rank, f"EF{index}"))
        return found + [(where[text], text) for text in texts]

    times, ends = durations(plan), {}
    clocks, spots = [0.0] * len(plan.ranks), [0] * len(plan.ranks)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(plan.ranks):
            if spots[rank] == len(actions):
                continue
            action = actions[spots[rank]]
            required = needs(rank, action)
            if all(need in ends for need in required):
                arrivals = [ends[need] + plan.costs.latency * (need[0] != rank) for need in required]
                clocks[rank] = max([clocks[rank], *arrivals]) + times[rank][spots[rank]]
                ends[rank, str(action)] = clocks[rank]
                spots[rank] += 1
                moved = True
    return ends


def predecessors(plan: Plan) -> dict[tuple[int, Action], list[tuple[int, Action]]]:
    """The dependencies of each (rank, action), as (rank, action) pairs."""
    flow = Dataflow(plan)
    keys = list(zip(flow.ranks, flow.actions, strict=True))
    return {key: [keys[need] for need in needs] for key, needs in zip(keys, flow.needs, strict=True)}


def rendezvous_completes(plan: Plan, timeline: Timeline) -> bool:
    """Whether the plan runs if each send blocks until the other rank stands at just the matching receive.

    Every message is sent and received at the moment of the total order right after the action that gives it.
    """
    receivers: dict[tuple[int, Action], set[int]] = defaultdict(set)
    for (rank, _), needs in predecessors(plan).items():
        for need in needs:
            if need[0] != rank:
                receivers[need].add(rank)
    programs: list[list[tuple[str, int, str]]] = [[] for _ in plan.ranks]
    for rank, position in timeline.order:
        action = plan.ranks[rank][position]
        for receiver in sorted(receivers[rank, action]):
            programs[rank].append(("send", receiver, str(action)))
            programs[receiver].append(("receive", rank, str(action)))
    spots = [0] * len(programs)
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            if spots[rank] == len(program) or program[spots[rank]][0] == "receive":
                continue
            _, receiver, text = program[spots[rank]]
            if programs[receiver][spots[receiver] : spots[receiver] + 1] == [("receive", rank, text)]:
                spots[rank] += 1
                spots[receiver] += 1
                moved = True
    return spots == [len(program) for program in programs]
