"""LightningDataModules: they make batches of text, media and generator targets, in which every item has an owner.

`MultimodalDataModule` needs only `Source`s of examples. `PipelineDataModule` is for data whose tokens you make
yourself; digits.py is an example of it (`pip install bigmac-lightning[quickstart]`).
"""

from .base import PipelineDataModule, PipelineDataset, SampleList
from .encoding.audio import AudioProcessor
from .encoding.hf_audio import HFAudio
from .encoding.hf_visual import HFVisual
from .encoding.media_processor import MediaPlan, MediaProcessor
from .encoding.processors import byte_tokenizer
from .encoding.visual import PatchProcessor, TargetProcessor, VisualProcessor
from .errors import ExampleError, SourceError
from .example import Audio, Example, Image, MediaPart, Message, Size, Video
from .examples.clips_and_sums import Clips, Sums
from .examples.digits import DigitsDataModule
from .examples.drawn_digits import DrawnDigitsDataModule
from .examples.easy_vqa import EasyVQA, EasyVQADataModule, EasyVQADrawings
from .examples.two_speakers import TwoSpeakers
from .files import File
from .limits import Limits
from .loading.collate import Collator, Media, Sample, Target
from .loading.sampler import EpochSampler
from .media.modalities import Modality, register
from .multimodal import MultimodalDataModule
from .options import ChatOptions, LoadingOptions, MixtureOptions, PackingOptions
from .sources.caption_folder import CaptionFolder
from .sources.conversation import Conversation, example_of
from .sources.hugging_face import HFDataset, HFStream
from .sources.json_files import LlavaJSON, MessagesJSONL
from .sources.source import Source
from .sources.stream import SourceStream, Stream, Taken
from .sources.tars import WebDatasetTars
from .sources.text_files import TextFiles

__all__ = [
    "Audio",
    "AudioProcessor",
    "CaptionFolder",
    "ChatOptions",
    "Clips",
    "Collator",
    "Conversation",
    "DigitsDataModule",
    "DrawnDigitsDataModule",
    "EasyVQA",
    "EasyVQADataModule",
    "EasyVQADrawings",
    "EpochSampler",
    "Example",
    "ExampleError",
    "File",
    "HFAudio",
    "HFDataset",
    "HFStream",
    "HFVisual",
    "Image",
    "Limits",
    "LlavaJSON",
    "LoadingOptions",
    "Media",
    "MediaPart",
    "MediaPlan",
    "MediaProcessor",
    "Message",
    "MessagesJSONL",
    "MixtureOptions",
    "Modality",
    "MultimodalDataModule",
    "PackingOptions",
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
    "TwoSpeakers",
    "Video",
    "VisualProcessor",
    "WebDatasetTars",
    "byte_tokenizer",
    "example_of",
    "register",
]
