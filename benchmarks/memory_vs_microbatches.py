"""Peak activation bytes per component against the number of microbatches, for `nested` and `upfront`.

A real model (SigLIP tower, Qwen3 decoder, MMDiT generator; built from small configs) on two gloo ranks, one training
step per row, measured by saved-tensor hooks. Every microbatch is of the same size, so that only M varies.

    python -m benchmarks.memory_vs_microbatches
"""

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ranks import run_ranks
from bigmac_lightning.contracts.batch import Batch, MediaItem, Microbatch, PipelineLayout, TargetItem
from bigmac_lightning.contracts.owners import assign_owners
from bigmac_lightning.estimates.partition import LayerCosts, make_stages
from bigmac_lightning.models import (  # pyright: ignore[reportMissingImports]  (lies in models/, see pyproject.toml)
    FlowGenerator,
    HFDecoder,
    MultimodalLM,
    VisionEncoder,
)
from bigmac_lightning.runtime.measure.memory import MemoryTracker
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of

COMPONENTS = ("encoder", "llm", "generator")
WIDTH, IMAGE, PATCH = 64, 16, 4


def model() -> MultimodalLM:
    """A few hundred thousand parameters."""
    decoder: dict[str, Any] = {
        "model_type": "qwen3",
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
    }
    tower: dict[str, Any] = {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }
    mmdit = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6]}
    return MultimodalLM(
        HFDecoder(decoder),
        {"image": VisionEncoder(tower, width=WIDTH)},
        {"image": FlowGenerator(WIDTH, channels=3, config=mmdit)},
    )


def batch(microbatches: int, layout: PipelineLayout) -> Batch:
    """Microbatches of two samples of 40 tokens: an image at the front, an image to be drawn at the end."""
    rows, tokens, conditions = (IMAGE // PATCH) ** 2, 40, 4
    random = torch.Generator().manual_seed(microbatches)
    made = []
    for m in range(microbatches):
        ids = torch.randint(128, (2, tokens), generator=random)
        starts = torch.tensor([0, tokens])
        microbatch = Microbatch(
            inputs={"input_ids": ids, "position_ids": torch.arange(tokens).repeat(2, 1)},
            label_positions=(starts[:, None] + torch.arange(rows, tokens - 5)).flatten(),
            labels=ids[:, rows + 1 : tokens - 4].flatten(),
            media=[MediaItem("image", rows) for _ in range(2)],
            media_positions=(starts[:, None] + torch.arange(rows)).flatten(),
            targets=[TargetItem("image", conditions, (3, IMAGE, IMAGE), seed=2 * m + i) for i in range(2)],
            target_positions=(starts[:, None] + torch.arange(tokens - conditions, tokens)).flatten(),
        )
        made.append(microbatch)
    assign_owners(made, layout)
    for item in [item for microbatch in made for item in [*microbatch.media, *microbatch.targets]]:
        if item.owner == layout.rank:
            item.data = torch.randn(3, IMAGE, IMAGE, generator=random)
    return Batch(made, layout)


def measure(rank: int, size: int, counts: list[int], policies: list[str]) -> list[dict[str, int]]:
    """Peak bytes by component on this rank, for each policy and number of microbatches."""
    mesh = build_mesh(torch.device("cpu"), 1, size, range(size))
    module = model()
    module.part = part_of(rank, make_stages(LayerCosts((1.0,) * module.llm.num_layers), size), range(size))
    module.configure_model()
    peaks = []
    for policy in policies:
        runner = PipelineRunner(module, mesh, PipelineOptions(ScheduleOptions(policy=policy)))
        for count in counts:
            memory = runner.executor.memory = MemoryTracker(module.parameters())
            runner(batch(count, runner.layout), "train")
            assert not any(memory.live.values()), f"still alive after the step: {memory.live}"
            peaks.append(memory.peak)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    arguments = parser.parse_args()
    policies = ["nested", "upfront"]
    by_rank = run_ranks(arguments.ranks, measure, arguments.ranks, arguments.microbatches, policies)
    table = Table(title=f"peak activation KiB, largest of {arguments.ranks} ranks (x: relative to the first row)")
    for column in ("policy", "M", *COMPONENTS):
        table.add_column(column, justify="right")
    for p, policy in enumerate(policies):
        offset = p * len(arguments.microbatches)
        first: dict[str, int] = {}
        for i, count in enumerate(arguments.microbatches):
            peak = {name: max(rank[offset + i].get(name, 0) for rank in by_rank) for name in COMPONENTS}
            first = first or peak
            cells = [f"{peak[name] / 1024:,.0f} ({peak[name] / first[name]:.3f}x)" for name in COMPONENTS]
            table.add_row(policy, str(count), *cells)
        table.add_section()
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
