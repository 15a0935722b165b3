"""Step time on uneven data, by policy, by the order of microbatches and by how media items are given to ranks;
simulated, with true item times.

Each microbatch has 1 to 16 items (1 to 4 in the second table) whose encoder times are lognormal, scaled so that the
mean microbatch's forward takes EF. Figures are means over seeds: makespan / ideal, where the ideal is bare 1F1B and all
encoder work spread over the ranks; the most encoder units alive on any rank, 1 unit being the mean microbatch's work;
seconds to plan.
A limit of "3 units" is that of 3 units and the largest item together.

    python -m benchmarks.uneven_data
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import mean

from rich.console import Console
from rich.table import Table

from bigmac_lightning.schedule.assign import assign
from bigmac_lightning.schedule.groups import even_groups
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.plan import Costs
from bigmac_lightning.schedule.request import PlanRequest
from bigmac_lightning.schedule.simulate import simulate
from bigmac_lightning.schedule.workload import MicrobatchWork, Workload

RANKS, MICROBATCHES, MOST_ITEMS, SIGMA = 8, 64, 16, 1.0
GROUPS = even_groups(MICROBATCHES, RANKS)

Rows = list[list[float]]
"""Per microbatch, the encoder forward time of each of its items."""
Owners = list[list[int]]
"""Per microbatch, the rank of each of its items."""


def draw(seed: int, forward: float, items: int = MOST_ITEMS) -> Rows:
    """Times of 1 to `items` items whose mean microbatch takes `forward`."""
    chance = Random(seed)
    rows = [[chance.lognormvariate(0, SIGMA) for _ in range(chance.randint(1, items))] for _ in range(MICROBATCHES)]
    factor = forward * MICROBATCHES / sum(map(sum, rows))
    return [[factor * cost for cost in row] for row in rows]


def wrong(rows: Rows, error: float, seed: int) -> Rows:
    """What somebody believes whose every item time is off by a random factor of about 1 + `error`."""
    chance = Random(1000 + seed)
    return [[cost * chance.lognormvariate(0, error) for cost in row] for row in rows]


def whole_microbatches(rows: Rows) -> Owners:
    """All items of microbatch m on rank m modulo the number of ranks, whatever they cost."""
    return [[m % RANKS] * len(row) for m, row in enumerate(rows)]


def group_by_group(rows: Rows) -> Owners:
    """Longest first to the least loaded rank, in each group anew."""
    return [owners for group in GROUPS for owners in _assign(rows, [group])]


def carried_over(rows: Rows) -> Owners:
    """As the framework does it: what is uneven in one group is carried over to the next."""
    return _assign(rows, GROUPS)


def _assign(rows: Rows, groups: Sequence[Sequence[int]]) -> Owners:
    chosen = assign([[cost for m in group for cost in rows[m]] for group in groups], range(RANKS))
    rest = [iter(owners) for owners in chosen]
    return [[next(owner) for _ in rows[m]] for group, owner in zip(groups, rest, strict=True) for m in group]


def costliest_first(rows: Rows) -> Rows:
    """Microbatches by their costliest item, as the DataModule orders them."""
    return sorted(rows, key=max, reverse=True)


def groups_of_even_cost(rows: Rows) -> Rows:
    """Microbatches so that all groups cost about as much: costliest first, each into the cheapest group with room."""
    groups: list[Rows] = [[] for _ in GROUPS]
    for row in sorted(rows, key=sum, reverse=True):
        min((group for group in groups if len(group) < RANKS), key=_total).append(row)
    return [row for group in groups for row in group]


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        policy: by name.
        owners: who encodes what; None: the rank of stage 0 everything.
        units: the most encoder units alive, beyond those of the largest item; None: no limit.
        error: how wrong the item times are that the plan is made with.
        order: of the microbatches; None: as drawn.
    """

    policy: str
    owners: Callable[[Rows], Owners] | None
    units: float | None = None
    error: float = 0.0
    order: Callable[[Rows], Rows] | None = None


CASES = {
    "first_stage": Case("first_stage", None),
    "upfront": Case("upfront", carried_over),
    "nested, whole microbatches": Case("nested", whole_microbatches),
    "nested, group by group": Case("nested", group_by_group),
    "nested, carried over": Case("nested", carried_over),
    "filled, group by group, 3 units": Case("filled", group_by_group, 3),
    "filled, carried over, 3 units": Case("filled", carried_over, 3),
    "filled, carried over, 4 units": Case("filled", carried_over, 4),
    "  item times wrong by 10%": Case("filled", carried_over, 4, 0.1),
    "  item times wrong by 20%": Case("filled", carried_over, 4, 0.2),
    "  item times wrong by 40%": Case("filled", carried_over, 4, 0.4),
}

ORDERS = {
    "nested, any order": Case("nested", carried_over),
    "nested, groups of even cost": Case("nested", carried_over, order=groups_of_even_cost),
    "nested, costliest item first": Case("nested", carried_over, order=costliest_first),
    "filled, any order": Case("filled", carried_over),
    "filled, groups of even cost": Case("filled", carried_over, order=groups_of_even_cost),
    "filled, costliest item first": Case("filled", carried_over, order=costliest_first),
}
"""The same owners, with microbatches in several orders."""


@dataclass(frozen=True)
class Result:
    """Of one plan, with true times: makespan / ideal, the most encoder units alive, and seconds to make it."""

    ratio: float
    units: float
    seconds: float


def measure(case: Case, seed: int, forward: float, items: int = MOST_ITEMS) -> Result:
    """Plan a batch, and simulate it with true times; the encoder backward takes twice its forward."""
    true = draw(seed, forward, items)
    if case.order is not None:
        true = case.order(true)
    believed = wrong(true, case.error, seed) if case.error else true
    owners = case.owners(believed) if case.owners else None
    units = None if case.units is None else case.units + max(map(max, believed)) * MICROBATCHES / _total(believed)
    began = time.perf_counter()
    plan = make_plan(
        PlanRequest(
            policy=case.policy,
            pipeline_parallel_size=RANKS,
            microbatches=MICROBATCHES,
            costs=Costs(EF=forward, EB=2 * forward),
            encoder_shares=_shares(believed, owners) if owners else None,
            workload=_workload(believed),
            max_encoder_units=units,
        )
    )
    seconds = time.perf_counter() - began
    if case.error and owners:
        plan = replace(plan, encoder_shares=_shares(true, owners))
    timeline = simulate(plan, _workload(true))
    return Result(timeline.makespan / _ideal(plan.costs), max(timeline.encoder_units), seconds)


def _workload(rows: Rows) -> Workload:
    return Workload(tuple(MicrobatchWork(encoder=tuple(row)) for row in rows))


def _total(rows: Rows) -> float:
    return sum(map(sum, rows))


def _ideal(costs: Costs) -> float:
    return (MICROBATCHES + RANKS - 1) * (costs.F + costs.B) + MICROBATCHES / RANKS * (costs.EF + costs.EB)


def _shares(rows: Rows, owners: Owners) -> list[list[float]]:
    """Per group, the fraction of its time that each rank has."""
    shares: list[list[float]] = []
    for group in GROUPS:
        times = [0.0] * RANKS
        for m in group:
            for cost, owner in zip(rows[m], owners[m], strict=True):
                times[owner] += cost
        shares.append([time / sum(times) for time in times])
    return shares


def tabulate(title: str, cases: Mapping[str, Case], items: int, seeds: Sequence[int]) -> Table:
    table = Table(title=f"P={RANKS}, M={MICROBATCHES}, 1f1b, 1 to {items} items, {len(seeds)} seeds")
    table.add_column(title, no_wrap=True)
    for text in ("EF 1", "units", "EF 4", "units", "seconds"):
        table.add_column(text, justify="right")
    for name, case in cases.items():
        cells, seconds = [name], 0.0
        for forward in (1.0, 4.0):
            results = [measure(case, seed, forward, items) for seed in seeds]
            cells.append(f"{mean(result.ratio for result in results):.3f}")
            cells.append(f"{mean(result.units for result in results):.1f}")
            seconds = max(seconds, mean(result.seconds for result in results))
        table.add_row(*cells, f"{seconds:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    seeds = range(parser.parse_args().seeds)
    Console().print(tabulate("policy and owners", CASES, MOST_ITEMS, seeds))
    Console().print(tabulate("policy and order", ORDERS, 4, seeds))


if __name__ == "__main__":
    main()
