"""A model whose layers compute: a SigLIP tower, a Qwen3 decoder and an MMDiT generator with a few million weights."""

from typing import Any

from bigmac_lightning.contracts.components import Encoder, Generator
from bigmac_lightning.models import (  # pyright: ignore[reportMissingImports]  (lies in models/, see pyproject.toml)
    FlowGenerator,
    HFDecoder,
    VisionEncoder,
)

WIDTH, IMAGE, PATCH, VOCABULARY = 256, 64, 8, 512
ROWS = (IMAGE // PATCH) ** 2
LAYERS = 4


def computing_parts() -> tuple[HFDecoder, dict[str, Encoder], dict[str, Generator]]:
    """The components of the model, all in float32."""
    decoder: dict[str, Any] = {
        "model_type": "qwen3",
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    tower: dict[str, Any] = {
        "model_type": "siglip_vision_model",
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }
    mmdit = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 48, "axes_dims_rope": [8, 20, 20]}
    return (
        HFDecoder(decoder),
        {"image": VisionEncoder(tower, width=WIDTH)},
        {"drawing": FlowGenerator(WIDTH, channels=3, config=mmdit)},
    )
