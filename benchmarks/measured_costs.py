"""Are plans from measured times as good as plans from the true ones, and do steps take as long as they say? Layers that
sleep as devices compute, with real messages over gloo.

    python -m benchmarks.measured_costs

The encoder takes `--encoder` times, and the generator `--generator` times as long as a guess says. A row is a run that
was told the truth, one that measures, and one that believes the guess.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ranks import awake_cores, prompt_wake_ups, run_ranks
from benchmarks.sharded_makespan import sleeping_module, timed_steps
from bigmac_lightning.ranks import Ranks
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.measuring import FIRST, Measuring
from bigmac_lightning.training.options import DEFAULT_COSTS, PipelineOptions
from bigmac_lightning.training.runner import PipelineRunner

RUNS = ("truth", "measured", "guess")


def measure(
    rank: int, size: int, microbatches: int, unit: float, repeats: int, policy: str, encoder: float, generator: float
) -> dict[str, tuple[float, float]]:
    """For each run, the median seconds of a step, and what its plan said (in seconds)."""
    prompt_wake_ups()
    mesh, found = build_mesh(torch.device("cpu"), 1, size, range(size)), dict[str, tuple[float, float]]()
    truth = Costs(F=1, B=2, EF=encoder, EB=2 * encoder, G=3 * generator)
    for run in RUNS:
        module = sleeping_module(rank, size, unit, encoder, generator)
        options = PipelineOptions(ScheduleOptions(policy, costs={"truth": truth, "guess": DEFAULT_COSTS}.get(run)))
        measuring = Measuring(Ranks(), mesh.device) if run == "measured" else None
        runner = PipelineRunner(module, mesh, options, measuring=measuring)
        seconds = timed_steps(runner, microbatches, FIRST if measuring else 1, repeats)
        plan = runner.last_planned
        assert plan is not None
        said = plan.seconds if plan.seconds is not None else plan.plan.makespan * unit
        found[run] = (seconds, said)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--unit", type=float, default=0.02, help="seconds of a stage's forward")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--policy", default="filled")
    parser.add_argument("--encoder", type=float, nargs="*", default=[5.0, 0.2])
    parser.add_argument("--generator", type=float, nargs="*", default=[0.2, 5.0])
    given = parser.parse_args()
    table = Table(title=f"policy {given.policy}, P={given.ranks}, M={given.microbatches}: seconds of a step")
    for column in ("encoder", "generator", "truth", "measured", "of truth", "plan of measured", "guess", "of truth"):
        table.add_column(column, justify="right")
    with awake_cores():
        for encoder, generator in zip(given.encoder, given.generator, strict=True):
            sizes = (given.ranks, given.microbatches, given.unit, given.repeats, given.policy)
            found = run_ranks(given.ranks, measure, *sizes, encoder, generator)
            slowest = {run: max(rank[run][0] for rank in found) for run in RUNS}
            said, truth = found[0]["measured"][1], slowest["truth"]
            table.add_row(
                *(f"{encoder:g}x", f"{generator:g}x", f"{truth:.3f}"),
                *(f"{slowest['measured']:.3f}", f"{slowest['measured'] / truth:.3f}x"),
                *(f"{said:.3f} ({said / slowest['measured']:.3f}x)", f"{slowest['guess']:.3f}"),
                f"{slowest['guess'] / truth:.3f}x",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
