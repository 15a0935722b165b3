"""Tiny components, and batches of unequal microbatches with random content."""

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bigmac_lightning.contracts.batch import PipelineLayout
from bigmac_lightning.contracts.components import Encoder, Generator
from bigmac_lightning.datamodules import Collator, Media, Sample, Target
from bigmac_lightning.models import FlowGenerator, HFDecoder, LatentCodec, MultimodalLM, VisionEncoder

WIDTH, VOCABULARY, LAYERS = 32, 40, 5

TOWER: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def decoder_config(model_type: str = "qwen3", **changes: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


AnyComponent = TypeVar("AnyComponent", bound=Encoder | Generator | LatentCodec)


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Counts operations; those of fused attention would not be on the CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def ready(component: AnyComponent) -> AnyComponent:
    """With weights, as a module gives them to its components."""
    component.materialize()
    return component


def flow(**changes: Any) -> FlowGenerator:
    config = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6]}
    arguments: dict[str, Any] = {"width": WIDTH, "channels": 1, "config": config, "steps": 4, **changes}
    return ready(FlowGenerator(**arguments))


def model(**changes: Any) -> MultimodalLM:
    parts: dict[str, Any] = {
        "llm": HFDecoder(decoder_config(tie_word_embeddings=True)),
        "encoders": {"image": VisionEncoder(TOWER, WIDTH)},
        "generators": {"image": flow()},
        **changes,
    }
    return MultimodalLM(**parts)


def image(seed: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(1, height, width, generator=torch.Generator().manual_seed(seed))


def samples(kinds: str) -> list[Sample]:
    """One sample per letter: "r" reads an image, "d" draws one, "t" is text; sizes differ from one to the next."""
    made: list[Sample] = []
    for i, kind in enumerate(kinds):
        random = Random(i)
        words = [random.randrange(3, VOCABULARY) for _ in range(random.randrange(4, 9))]
        labelled = [s > 0 and (kind != "d" or s % 2 == 0) for s in range(len(words))]
        if kind == "r":
            height, width = random.choice([(8, 8), (8, 4)])
            rows = height * width // 4
            media = Media("image", 1, rows, lambda i=i, h=height, w=width: image(i, h, w))
            made.append(Sample([3, *[4] * rows, *words], [False] * (rows + 1) + labelled, [media]))
        elif kind == "d":
            target = Target("image", len(words), 3 + i % 2, (1, 8, 8), seed=i, load=lambda i=i: image(100 + i, 8, 8))
            made.append(Sample(words + [5] * target.rows, labelled + [False] * target.rows, targets=[target]))
        else:
            made.append(Sample(words, labelled))
    return made


def collate(kinds: str, microbatches: int) -> Any:
    return Collator(PipelineLayout(), microbatches)(samples(kinds))
