"""The memory of a rank by setting, as `bigmac plan --config` estimates it: the table of docs/memory.md.

The run is `configs/qwen3_moe_vit_mmdit.yaml` (30 B + 1.3 B + 20 B parameters, 16 ranks). A row changes what it names.
Weights, gradients and moments are exact, activations are estimates. Nothing is trained.

    python -m benchmarks.memory_settings
"""

from pathlib import Path

from bigmac_lightning.commands.plan_config import RunReader, estimated
from bigmac_lightning.estimates.ranks import RankEstimate

CONFIG = Path(__file__).parents[1] / "configs" / "qwen3_moe_vit_mmdit.yaml"
STRATEGY = "--trainer.strategy.init_args"
CHECKPOINTING = [
    f"--model.init_args.{part}.init_args.gradient_checkpointing=false"
    for part in ("llm", "encoders.image", "generators.image")
]
SHARDS = f"{STRATEGY}.sharding"
SETTINGS: dict[str, list[str]] = {
    "the config": [],
    "`policy: upfront`": [f"{STRATEGY}.schedule.policy=upfront"],
    "`policy: upfront`, 128 microbatches": [f"{STRATEGY}.schedule.policy=upfront", "--microbatches=128"],
    "`nested`, 128 microbatches": ["--microbatches=128"],
    "no `gradient_checkpointing`": CHECKPOINTING,
    "`encoders: ddp`, `generators: ddp`": [f"{SHARDS}.encoders=ddp", f"{SHARDS}.generators=ddp"],
    "`encoders: zero1`, `generators: zero1`": [f"{SHARDS}.encoders=zero1", f"{SHARDS}.generators=zero1"],
    "`offload: [encoders, generators]`": [f"{SHARDS}.offload=[encoders,generators]"],
    "`precision: bf16-mixed`": ["--trainer.precision=bf16-mixed"],
    "`stages: zero1`, `master_weights: true`": [f"{SHARDS}.stages=zero1", f"{SHARDS}.master_weights=true"],
    "`stages: zero1`, 8 pipelines": [f"{SHARDS}.stages=zero1", "--trainer.num_nodes=16"],
    "`freeze: [llm]`": ["--model.init_args.freeze=[llm]"],
}
COLUMNS = ("weights, gradients, moments", "gathered", "LLM", "encoder", "generator", "together", "on the CPU")


def largest(arguments: list[str]) -> RankEstimate:
    """The rank that needs the most memory."""
    estimate = estimated(RunReader("plan", ["--config", str(CONFIG), *arguments])).estimate
    return max(estimate.ranks, key=lambda rank: rank.memory)


def row(rank: RankEstimate) -> list[str]:
    activations = [rank.activations[kind] for kind in ("LLM", "encoder", "generator")]
    sizes = [rank.static, rank.gathered, *activations, rank.memory, rank.offloaded]
    return [f"{size / 2**30:.1f}" for size in sizes]


def table() -> str:
    """Markdown, in GiB."""
    lines = ["| changed | " + " | ".join(COLUMNS) + " |", "| --- " * (1 + len(COLUMNS)) + "|"]
    lines += [f"| {name} | " + " | ".join(row(largest(arguments))) + " |" for name, arguments in SETTINGS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
