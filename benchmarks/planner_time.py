"""How long does planning take? Cut and filled plans, from small pipelines to large ones.

python -m benchmarks.planner_time --output planner_time.png
"""

import argparse
import time

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.plan import Costs
from bigmac_lightning.schedule.request import PlanRequest

SHAPES = [
    (4, 16),
    (4, 32),
    (8, 32),
    (8, 64),
    (16, 64),
    (16, 128),
    (16, 256),
    (32, 256),
    (32, 512),
    (64, 512),
    (64, 1024),
]
POLICIES = {"nested": "cut", "filled": "filled"}


def seconds(size: int, microbatches: int, policy: str, backbone: str) -> tuple[float, float, int]:
    """Processor time of a plan, the best of up to three; its makespan over the ideal; its number of actions."""
    times: list[float] = []
    while True:
        start = time.process_time()
        plan = make_plan(
            PlanRequest(
                policy=policy,
                backbone=backbone,
                pipeline_parallel_size=size,
                microbatches=microbatches,
                costs=Costs(EF=4, EB=8),
            )
        )
        times.append(time.process_time() - start)
        if len(times) == 3 or sum(times) > 1:
            return min(times), plan.makespan / plan.ideal, sum(map(len, plan.ranks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="1f1b")
    parser.add_argument("--output", default=None, help="a picture: time against the number of actions")
    arguments = parser.parse_args()
    table = Table(title=f"planner time on {arguments.backbone}, EF/EB = 4/8, group_size = P; plans are verified")
    for column in ("P", "M", "actions", "cut, s", "us/action", "filled, s", "us/action", "filled/ideal"):
        table.add_column(column, justify="right")
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in POLICIES.values()}
    for size, microbatches in SHAPES:
        cells: list[str] = []
        actions, ratio = 0, 1.0
        for policy, name in POLICIES.items():
            taken, ratio, actions = seconds(size, microbatches, policy, arguments.backbone)
            curves[name].append((actions, taken))
            cells += [f"{taken:.3f}", f"{taken / actions * 1e6:.0f}"]
        table.add_row(str(size), str(microbatches), str(actions), *cells, f"{ratio:.4f}")
    Console(width=110).print(table)
    if arguments.output:
        figure = Figure(figsize=(6, 4), layout="constrained")
        axis = figure.subplots()
        for name, points in curves.items():
            axis.loglog(*zip(*points, strict=True), "o-", label=name)
        axis.set_xlabel("actions of the plan")
        axis.set_ylabel("seconds")
        axis.set_title(f"planner time on {arguments.backbone}", loc="left", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend()
        figure.savefig(arguments.output, dpi=120)


if __name__ == "__main__":
    main()
