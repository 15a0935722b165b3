"""The picture of README.md: the same step with the encoder in the first stage, and nested, as both were executed.

Devices that sleep run both plans with the real executor over gloo, as in `schedule_fidelity`; a forward of one stage
sleeps 50 ms. Both timelines have the same scale of time.

    python -m benchmarks.timelines --output docs/images/nested.png
"""

import argparse

import torch
import torch.distributed as dist

from benchmarks.ranks import awake_cores, prompt_wake_ups, run_ranks
from benchmarks.schedule_fidelity import SleepingWork
from bigmac_lightning.runtime.executor import Executor
from bigmac_lightning.runtime.lowering import Needs, lower
from bigmac_lightning.runtime.measure.trace import Trace
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.draw import Span, compared_picture
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.plan import Costs, Plan
from bigmac_lightning.schedule.request import PlanRequest
from bigmac_lightning.schedule.verify import verify

POLICIES = {
    "first_stage": "encoder in the first stage, generator in the last one",
    "nested": "encoder and generator nested into the LLM's schedule",
}
COSTS = Costs(F=1, B=2, EF=1, EB=2, G=3)


def plans(ranks: int, microbatches: int) -> list[Plan]:
    """The plans of the policies on 1F1B."""
    return [
        make_plan(PlanRequest(policy=policy, pipeline_parallel_size=ranks, microbatches=microbatches, costs=COSTS))
        for policy in POLICIES
    ]


def executed(rank: int, made: list[Plan], unit: float) -> list[list[Span]]:
    """For each plan, when each action of this rank ran in the second of two steps, in units since the step began."""
    prompt_wake_ups()
    results: list[list[Span]] = []
    mesh = build_mesh(torch.device("cpu"), 1, made[0].pipeline_parallel_size, tuple(made[0].stage_rank))
    for plan in made:
        needs = Needs((True,) * plan.stages, (True,) * plan.microbatches, generator=True)
        program = lower(plan, verify(plan).order, needs)[rank]
        executor, trace = Executor(mesh, tuple(plan.stage_rank)), None
        for _ in range(2):  # the first one warms up
            dist.barrier()
            executor.trace = trace = Trace(torch.device("cpu"))
            executor.run(program, SleepingWork(plan, rank, unit), needs, plan.recomputes)
        assert trace is not None
        results.append([(Action.parse(s.action), s.start / unit, s.end / unit) for s in trace.spans()])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="timelines.png")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--unit_ms", type=float, default=50.0)
    arguments = parser.parse_args()
    made = plans(arguments.ranks, arguments.microbatches)
    with awake_cores():
        by_rank = run_ranks(arguments.ranks, executed, made, arguments.unit_ms / 1e3)
    timelines = {name: [rank[i] for rank in by_rank] for i, name in enumerate(POLICIES.values())}
    compared_picture(timelines, arguments.output, f"time, in forwards of one stage ({arguments.unit_ms:g} ms)")


if __name__ == "__main__":
    main()
