"""Callbacks that show what the pipeline does (PipelineMonitor) and what the generators draw (SampleImages)."""

from bigmac_lightning.callbacks.pipeline_monitor import PipelineMonitor
from bigmac_lightning.callbacks.sample_images import SampleImages

__all__ = ["PipelineMonitor", "SampleImages"]
