"""The paper's workload, simulated: configs/qwen3_moe_vit_mmdit.yaml on 128 ranks, by counted multiplications.

    python -m benchmarks.paper_workload   # two minutes; writes benchmarks/results/paper_workload.json

Nothing is measured here. All components are taken to reach the same fraction of the accelerator's peak, and messages to
take no time; so ratios depend on multiplications alone. There are two layouts: pipelines of 16 ranks, and pipelines of
4 ranks with 4 tensor peers each.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peers.documents import FOLDER, ROOT, markdown
from bigmac_lightning.commands.plan_config import RunReader
from bigmac_lightning.estimates.ranks import Precision
from bigmac_lightning.estimates.step import StepEstimate
from bigmac_lightning.runtime.mesh import mesh_shape
from bigmac_lightning.schedule.costs import NEGLIGIBLE, Costs
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions, ShardingOptions
from bigmac_lightning.training.stages import resolve_options

RESULTS = "paper_workload.json"
CONFIG = ROOT / "configs" / "qwen3_moe_vit_mmdit.yaml"
ACCELERATOR, PEAK, USED = "H800", 989.0, 0.4
"""Dense bfloat16 TFLOP/s of the accelerator, and the fraction that is taken to be reached."""

INIT = "--trainer.strategy.init_args"
LAYOUTS = {
    "8 pipelines of 16 ranks": [],
    "8 pipelines of 4 ranks of 4 tensor peers": [
        f"{INIT}.pipeline_parallel_size=4",
        f"{INIT}.tensor_parallel_size=4",
        f"{INIT}.expert_parallel_size=4",
    ],
}
MEDIA_ROWS = (256, 1024, 2048, 4096)
MICROBATCHES, MANY = 64, (16, 32, 64, 128, 256)
POLICIES = ("first_stage", "disaggregated", "upfront", "recompute", "nested", "filled")


@dataclass(frozen=True)
class Estimator:
    """Estimates steps of the workload in one layout."""

    run: RunReader
    options: PipelineOptions
    stages: Sequence[range]
    size: int
    replicas: int

    @classmethod
    def of(cls, layout: str) -> "Estimator":
        """Build the model on the meta device."""
        run = RunReader("plan", ["--config", str(CONFIG), "--trainer.num_nodes=16", *LAYOUTS[layout]])
        strategy = run.strategy
        replicas, size = mesh_shape(run.world_size, *strategy.sizes, peers=strategy.options.parallel.peers)
        options, stages, _ = resolve_options(run.model, strategy.options, size)
        run.model.adapt()
        return cls(run, options, stages, size, replicas)

    def step(self, media_rows: int, microbatches: int = MICROBATCHES, policy: str = "nested") -> StepEstimate:
        """The estimate of a step whose microbatches have so many rows of media."""
        options = replace(self.options, schedule=replace(self.options.schedule, policy=policy))
        microbatch = replace(self.run.microbatch(), media_rows=media_rows)
        precision, replicas = Precision.of("bf16-true"), self.replicas
        arguments = (self.stages, self.size, microbatch, microbatches, precision, True, replicas)
        return StepEstimate(self.run.model, options, *arguments)

    def without_shards(self) -> "Estimator":
        """As under first_stage, whose encoder and generator are on one rank each, and whole."""
        return replace(self, options=replace(self.options, sharding=ShardingOptions()))


def seconds(costs: Costs, size: int, policy: str, microbatches: int = MICROBATCHES, **further: Any) -> float:
    """How long a step takes on the accelerator, by its plan."""
    options = ScheduleOptions(policy, costs=costs)
    plan = make_plan(options.request(size, microbatches, **further))
    return plan.makespan / (PEAK * USED)


def rebalanced(costs: Costs, size: int) -> float:
    """Seconds of a step under first_stage if the LLM is cut so that stages with the encoder and the generator have less
    of it. Layers may be cut anywhere, which is better than a peer can do."""
    passes = costs.F + costs.B
    extra = [0.0] * size
    extra[0] += costs.EF + costs.EB
    extra[-1] += costs.G
    low, high = 0.0, passes * size + sum(extra)
    for _ in range(100):  # the level to which all stages are filled, by bisection
        level = (low + high) / 2
        full = sum(max(0.0, level - there) for there in extra) > passes * size
        low, high = (low, level) if full else (level, high)
    shares = [max(NEGLIGIBLE, high - there) / passes for there in extra]
    rows = [[share * cost for cost in (costs.F, costs.B, costs.I, costs.W)] for share in shares]
    return seconds(costs, size, "first_stage", stage_costs=rows)


def speeds(estimator: Estimator, layout: str) -> list[dict[str, Any]]:
    """For each number of media rows, with and without the generator: seconds of a step by policy."""
    rows = list[dict[str, Any]]()
    for media_rows in MEDIA_ROWS:
        with_generator = estimator.step(media_rows).costs
        for costs in (replace(with_generator, G=0.0), with_generator):
            times = {policy: _or_none(costs, estimator.size, policy) for policy in POLICIES}
            times["first_stage, cut anew"] = rebalanced(costs, estimator.size)
            rows.append({"layout": layout, "media_rows": media_rows, "costs": asdict(costs), "seconds": times})
    return rows


def _or_none(costs: Costs, size: int, policy: str) -> float | None:
    try:
        return seconds(costs, size, policy)
    except ValueError:
        return None


def memory(estimator: Estimator, layout: str) -> list[dict[str, Any]]:
    """Peak bytes of activations on the rank that has most, by the number of microbatches of a step."""
    rows = list[dict[str, Any]]()
    for policy in ("first_stage", "upfront", "nested", "filled"):
        of_policy = estimator.without_shards() if policy == "first_stage" else estimator
        for microbatches in MANY:
            ranks = of_policy.step(2048, microbatches, policy).ranks
            most = max(sum(rank.activations.values()) for rank in ranks)
            static = max(rank.static + rank.gathered for rank in ranks)
            row = {"layout": layout, "policy": policy, "microbatches": microbatches, "activations": most}
            rows.append(row | ({} if policy == "first_stage" else {"weights": static}))
    return rows


def text(results: dict[str, Any]) -> str:
    """The tables."""
    head = ["layout", "media rows of 8,192", "generator", "EF / F", "G / F", "nested, s", "filled / nested"]
    against = ("first_stage", "first_stage, cut anew", "disaggregated", "recompute", "upfront")
    lines = [
        [
            *_key(row),
            f"{row['seconds']['nested']:.2f}",
            f"{row['seconds']['filled'] / row['seconds']['nested']:.3f}",
            *(_speedup(row["seconds"], policy) for policy in against),
        ]
        for row in results["speeds"]
    ]
    speed = markdown([*head, *(f"over {policy}" for policy in against)], lines)
    columns = ["layout", "policy", *(f"M = {many}" for many in MANY)]
    cells = dict[tuple[str, str], list[str]]()
    for row in results["memory"]:
        cells.setdefault((row["layout"], row["policy"]), []).append(f"{row['activations'] / 2**30:.1f}")
    table = markdown(columns, [[*key, *values] for key, values in cells.items()])
    intro = (
        f"`python -m benchmarks.paper_workload`: M = {MICROBATCHES}, `1f1b`; {results['accelerator']} at "
        f"{results['peak']:g} TFLOP/s, of which {results['used']:.0%} are taken to be reached by all components. The "
        "last columns are speedups of `filled` over other policies."
    )
    return "\n\n".join([intro, speed, "Peak activations in GiB, 2,048 media rows, with the generator:", table])


def _key(row: dict[str, Any]) -> list[str]:
    costs = row["costs"]
    ratios = (costs["EF"] / costs["F"], costs["G"] / costs["F"])
    return [
        row["layout"],
        f"{row['media_rows']:,}",
        "yes" if costs["G"] else "no",
        *(f"{ratio:.2f}" for ratio in ratios),
    ]


def _speedup(times: dict[str, float | None], policy: str) -> str:
    other, own = times[policy], times["filled"]
    return "-" if other is None or own is None else f"{other / own:.2f}x"


def load(folder: Path = FOLDER) -> dict[str, Any]:
    """The results in a folder."""
    return json.loads((folder / RESULTS).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    known: dict[str, Any] = {"accelerator": ACCELERATOR, "peak": PEAK, "used": USED, "speeds": [], "memory": []}
    for layout in LAYOUTS:
        estimator = Estimator.of(layout)
        known["speeds"] += speeds(estimator, layout)
        known["memory"] += memory(estimator, layout)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).write_text(json.dumps(known, indent=1) + "\n")
    print(text(known))


if __name__ == "__main__":
    main()
