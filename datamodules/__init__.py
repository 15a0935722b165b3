"""LightningDataModules: samples of text, media and generator targets, as microbatches with an owner for every item.

`MultimodalDataModule` takes `Source`s of examples and does the rest. `PipelineDataModule` is for those who make tokens
themselves; digits.py shows it (`pip install bigmac-lightning[quickstart]`).
"""

from .base import PipelineDataModule, PipelineDataset, SampleList
from .caption_folder import CaptionFolder
from .collate import Collator, Media, Sample, Target
from .conversation import Conversation, example_of
from .digits import DigitsDataModule
from .easy_vqa import EasyVQA, EasyVQADataModule, EasyVQADrawings
from .example import Example, ExampleError, File, Image, Message, Size, Video
from .failures import SourceError
from .hf_processor import HFVisual
from .hugging_face import HFDataset, HFStream
from .json_files import LlavaJSON, MessagesJSONL
from .multimodal import MultimodalDataModule
from .sampler import EpochSampler
from .small_sources import Clips, Sums
from .source import Source
from .stream import SourceStream, Stream, Taken
from .tars import WebDatasetTars
from .text_files import TextFiles
from .tokenizers import byte_tokenizer
from .visual import PatchProcessor, TargetProcessor, VisualProcessor

__all__ = [
    "CaptionFolder",
    "Clips",
    "Collator",
    "Conversation",
    "DigitsDataModule",
    "EasyVQA",
    "EasyVQADataModule",
    "EasyVQADrawings",
    "EpochSampler",
    "Example",
    "ExampleError",
    "File",
    "HFDataset",
    "HFStream",
    "HFVisual",
    "Image",
    "LlavaJSON",
    "Media",
    "Message",
    "MessagesJSONL",
    "MultimodalDataModule",
    "PatchProcessor",
    "PipelineDataModule",
    "PipelineDataset",
    "Sample",
    "SampleList",
    "Size",
    "Source",
    "SourceError",
    "SourceStream",
    "Stream",
    "Sums",
    "Taken",
    "Target",
    "TargetProcessor",
    "TextFiles",
    "Video",
    "VisualProcessor",
    "WebDatasetTars",
    "byte_tokenizer",
    "example_of",
]
