"""Encoder, LLM and generator components, and the LightningModule made of them. All of it is single-device code.

They need `pip install bigmac-lightning[models]` (transformers, diffusers); nothing else in the package does.
"""

from .audio.audio_encoder import AudioEncoder
from .generation.codec import LatentCodec
from .generation.flow import FlowGenerator
from .llm.decoder import HFDecoder
from .multimodal_lm import MultimodalLM
from .unified.decoder import UnifiedDecoder
from .unified.pictures import NoisyPictureEncoder, VelocityHead
from .unified.unified_lm import UnifiedLM
from .vision.hf_encoders import HFAudioEncoder, HFVideoEncoder, HFVisionEncoder
from .vision.vision_encoder import VisionEncoder

__all__ = [
    "AudioEncoder",
    "FlowGenerator",
    "HFAudioEncoder",
    "HFDecoder",
    "HFVideoEncoder",
    "HFVisionEncoder",
    "LatentCodec",
    "MultimodalLM",
    "NoisyPictureEncoder",
    "UnifiedDecoder",
    "UnifiedLM",
    "VelocityHead",
    "VisionEncoder",
]
