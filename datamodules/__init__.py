"""LightningDataModules: samples of text, media and generator targets, as microbatches with an owner for every item.

The example to copy from is digits.py; to use it, `pip install bigmac-lightning[quickstart]`.
"""

from .base import PipelineDataModule, PipelineDataset, SampleList
from .collate import Collator, Media, Sample, Target
from .digits import DigitsDataModule
from .sampler import EpochSampler

__all__ = [
    "Collator",
    "DigitsDataModule",
    "EpochSampler",
    "Media",
    "PipelineDataModule",
    "PipelineDataset",
    "Sample",
    "SampleList",
    "Target",
]
