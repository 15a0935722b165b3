"""How long a step of each policy takes by its plan, for the cases of the grid. (No device is needed.)

python -m benchmarks.peers.simulated   # step time / ideal, two minutes
"""

from dataclasses import replace

from benchmarks.peers.bigmac import schedule_of
from benchmarks.peers.case import DATA_PARALLEL, INTERLEAVED, PIPELINING, POLICIES, Case, sleeping_cases
from benchmarks.peers.data import step_batch
from benchmarks.peers.sleeping import LAYERS_PER_RANK
from bigmac_lightning.schedule.simulate import simulate
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.planner import Planner
from bigmac_lightning.training.trained import Trained

SIMULATED = (*PIPELINING, *POLICIES, INTERLEAVED)


def makespan(case: Case, kind: str) -> float:
    """Time of a step by its plan, in units. torch's schedules are those of first_stage on the same backbone.

    Raises:
        ValueError: there is no plan.
    """
    assert kind not in DATA_PARALLEL
    schedule = schedule_of("first_stage" if kind in PIPELINING else kind, case.costs)
    if kind == "torch_interleaved":
        schedule = replace(schedule, backbone="interleaved_1f1b", virtual_stages=2)
    options = PipelineOptions(schedule, microbatches=case.microbatches)
    options, _ = options.resolved(case.size, LAYERS_PER_RANK * case.size, True, bool(case.generator))
    stages = len(options.stage_rank(case.size))
    trained = Trained((True,) * stages, frozenset({"image"}), bool(case.generator))
    planner = Planner(options, case.size, 0, trained)
    planned = planner(step_batch(case, 0, planner.layout))
    return simulate(planned.plan, planned.workload).makespan


def main() -> None:
    """Print a line for each case; "-" where there is no plan."""
    print("P encoder generator sigma", *SIMULATED)
    for case in sleeping_cases():
        print(
            case.size, case.encoder, case.generator, case.sigma, *(_cell(case, kind) for kind in SIMULATED), flush=True
        )


def _cell(case: Case, kind: str) -> str:
    try:
        return f"{makespan(case, kind) / case.ideal:.3f}"
    except ValueError:
        return "-"


if __name__ == "__main__":
    main()
