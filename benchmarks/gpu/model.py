"""The model that is trained on GPUs, and what a step computes."""

from dataclasses import dataclass
from typing import Any

import torch

from bigmac_lightning.contracts.batch import Batch, MediaItem, Microbatch, PipelineLayout
from bigmac_lightning.contracts.owners import assign_owners
from bigmac_lightning.estimates.microbatch import TypicalMicrobatch
from bigmac_lightning.estimates.ranks import Precision
from bigmac_lightning.estimates.step import StepEstimate
from bigmac_lightning.models import (  # pyright: ignore[reportMissingImports]  (lies in models/, see pyproject.toml)
    HFDecoder,
    MultimodalLM,
    VisionEncoder,
)
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.stages import resolve_options

POLICIES = ("nested", "filled", "first_stage", "upfront")
DDP = "DDP"


def options_of(policy: str) -> PipelineOptions:
    return PipelineOptions(ScheduleOptions("nested" if policy == DDP else policy))


@dataclass(frozen=True)
class Sizes:
    """The model, and what a step computes.

    Attributes:
        images: per microbatch, of `pixels` x `pixels`.
        counts: numbers of microbatches for which the peak of memory is measured.
    """

    width: int = 2048
    layers: int = 16
    inner: int = 6144
    heads: int = 16
    vocabulary: int = 32_768
    tower_width: int = 1024
    tower_layers: int = 12
    pixels: int = 448
    patch: int = 14
    tokens: int = 4096
    images: int = 2
    microbatches: int = 16
    counts: tuple[int, ...] = (8, 16, 32, 64)
    dtype: str = "bfloat16"

    @property
    def rows(self) -> int:
        """Feature rows of an image."""
        return (self.pixels // self.patch) ** 2

    def model(self) -> MultimodalLM:
        decoder: dict[str, Any] = {
            "model_type": "qwen3",
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 2,
            "head_dim": self.width // self.heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
        }
        tower: dict[str, Any] = {
            "model_type": "siglip_vision_model",
            "hidden_size": self.tower_width,
            "intermediate_size": 4 * self.tower_width,
            "num_hidden_layers": self.tower_layers,
            "num_attention_heads": self.heads,
            "image_size": self.pixels,
            "patch_size": self.patch,
        }
        return MultimodalLM(HFDecoder(decoder), {"image": VisionEncoder(tower, width=self.width)})

    def batch(self, microbatches: int, layout: PipelineLayout) -> Batch:
        """Rows of images and then of text; all microbatches are alike."""
        random, media = torch.Generator().manual_seed(microbatches), self.images * self.rows
        made = []
        for _ in range(microbatches):
            ids = torch.randint(self.vocabulary, (1, self.tokens), generator=random)
            made.append(
                Microbatch(
                    inputs={"input_ids": ids, "position_ids": torch.arange(self.tokens)[None]},
                    label_positions=torch.arange(media, self.tokens - 1),
                    labels=ids[0, media + 1 :],
                    media=[MediaItem("image", self.rows) for _ in range(self.images)],
                    media_positions=torch.arange(media),
                )
            )
        assign_owners(made, layout)
        for item in [item for microbatch in made for item in microbatch.media]:
            if item.owner == layout.rank:
                item.data = torch.randn(3, self.pixels, self.pixels, generator=random).to(getattr(torch, self.dtype))
        return Batch(made, layout)

    def estimate(self, size: int, microbatches: int, policy: str) -> list[float]:
        """Bytes that each rank will need, as `bigmac plan --config` estimates them."""
        module = self.model()
        options, stages, _ = resolve_options(module, options_of(policy), size)
        typical = TypicalMicrobatch(self.tokens, self.images * self.rows, self.rows)
        precision = Precision.of("bf16-true" if self.dtype == "bfloat16" else "32-true")
        return [
            rank.memory for rank in StepEstimate(module, options, stages, size, typical, microbatches, precision).ranks
        ]


TINY = Sizes(32, 4, 64, 4, 128, 32, 2, 16, 4, 64, 1, 4, (4, 8), "float32")
SMALL = Sizes(512, 8, 1536, 8, 8192, 384, 6, 224, 14, 1024, 2, 8, (8, 32))
