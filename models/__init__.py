"""Encoder, LLM and generator components, and the LightningModule made of them. Single-device code: no ranks inside.

Needs `pip install bigmac-lightning[models]` (transformers, diffusers); nothing else in the package does.
"""

from .codec import LatentCodec
from .decoder import HFDecoder
from .flow import FlowGenerator
from .hf_vision import HFVideoEncoder, HFVisionEncoder
from .multimodal_lm import MultimodalLM
from .vision import VisionEncoder

__all__ = [
    "FlowGenerator",
    "HFDecoder",
    "HFVideoEncoder",
    "HFVisionEncoder",
    "LatentCodec",
    "MultimodalLM",
    "VisionEncoder",
]
