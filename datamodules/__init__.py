"""LightningDataModules: samples of text, media and generator targets, as microbatches with an owner for every item.

The example to copy from is `bigmac_lightning.datamodules.digits`; it needs `pip install bigmac-lightning[quickstart]`.
"""

from .base import PipelineDataModule, PipelineDataset, SampleList
from .collate import Collator, Media, Sample, Target
from .sampler import EpochSampler

__all__ = [
    "Collator",
    "EpochSampler",
    "Media",
    "PipelineDataModule",
    "PipelineDataset",
    "Sample",
    "SampleList",
    "Target",
]
