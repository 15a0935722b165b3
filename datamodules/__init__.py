"""LightningDataModules: samples of text, media and generator targets, as microbatches with an owner for every item."""

from .base import PipelineDataModule, PipelineDataset
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
    "Target",
]
