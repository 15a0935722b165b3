"""Compares the search of `bigmac tune` with an exhaustive one, on three small problems.

Nothing is trained: both simulate the same plans with the same estimates.

    python -m benchmarks.tuning
"""

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from bigmac_lightning import Encoder, Generator
from bigmac_lightning.estimates.microbatch import TypicalMicrobatch
from bigmac_lightning.estimates.ranks import Precision
from bigmac_lightning.models import (  # pyright: ignore[reportMissingImports]
    FlowGenerator,
    HFDecoder,
    MultimodalLM,
    VisionEncoder,
)
from bigmac_lightning.training.options import ShardingOptions
from bigmac_lightning.tuning.communication import Device
from bigmac_lightning.tuning.evaluating import Evaluator, Problem
from bigmac_lightning.tuning.search import exhaustive, search
from bigmac_lightning.tuning.space import Space

WIDTH = 64
DECODER: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": WIDTH,
    "intermediate_size": 192,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
TOWER: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
}
MMDIT: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6]}
SLOW = Device(tflops=1e-2, bandwidth=2e7)
"""So slow that computing and sending the small models takes times like those of large models on GPUs."""


@dataclass(frozen=True)
class Case:
    """A problem and its space.

    Attributes:
        name: what is special about it.
        encoder_layers, generator_layers: numbers of layers; 0: there is none.
        problem: its memory and the tokens of its step.
        space: what may be chosen.
    """

    name: str
    encoder_layers: int
    generator_layers: int
    memory: float
    step_tokens: int
    space: Space


FEW: dict[str, Any] = {"policies": ("nested", "filled"), "backbones": ("1f1b", "zb1p")}
SHARDS = (ShardingOptions(), ShardingOptions("zero1", "zero1", "zero1"))
CASES = (
    Case(
        "a large encoder",
        *(12, 0, 64e6, 1024),
        Space(4, tokens=(1.0,), checkpointing=(False,), shardings=SHARDS[:1], partitions=("auto",), **FEW),
    ),
    Case(
        "encoder and generator, little memory",
        *(4, 4, 18e6, 1024),
        Space(4, tokens=(0.5,), shardings=SHARDS, partitions=("even",), pieces=(1,), **FEW),
    ),
    Case(
        "a large generator, 8 ranks",
        *(2, 10, 64e6, 2048),
        Space(8, False, (1.0,), (False,), SHARDS[1:], ("auto",), pieces=(1,), **FEW),
    ),
)


def problem_of(case: Case) -> Problem:
    """The problem of a case."""
    encoders, generators = dict[str, Encoder](), dict[str, Generator]()
    if case.encoder_layers:
        encoders["image"] = VisionEncoder({**TOWER, "num_hidden_layers": case.encoder_layers}, WIDTH)
    if case.generator_layers:
        config = {**MMDIT, "num_layers": case.generator_layers}
        generators["image"] = FlowGenerator(WIDTH, channels=1, config=config)
    module = MultimodalLM(HFDecoder(DECODER), encoders, generators)
    assert module.trained_layers
    module.adapt()
    microbatch = TypicalMicrobatch(
        128,
        media_rows=64 if case.encoder_layers else 0,
        item_rows=16,
        targets=2 if case.generator_layers else 0,
        target_rows=4,
        target_shape=(1, 16, 16),
    )
    return Problem(module, microbatch, case.step_tokens, 64, Precision(), case.memory, SLOW)


def main() -> None:
    console = Console()
    for case in CASES:
        begin = time.perf_counter()
        found = search(Evaluator(problem_of(case)), case.space)
        middle = time.perf_counter()
        everything = exhaustive(Evaluator(problem_of(case)), case.space)
        end = time.perf_counter()
        chosen, best = found.best[0], everything.best[0]
        console.print(f"{case.name}: a step takes {chosen.seconds / best.seconds:.4f} of the best one's time")
        console.print(f"  plans: {found.simulated} / {everything.simulated}, fitting layouts: {len(found.best)}")
        console.print(f"  seconds: {middle - begin:.1f} / {end - middle:.1f}")
        for name, one in (("chosen", chosen), ("best", best)):
            console.print(f"  {name}: {one.layout}, {one.layout.sharding.stages}, {one.schedule}", soft_wrap=True)


if __name__ == "__main__":
    main()
