"""Callbacks that show what the pipeline does (PipelineMonitor) and what the generators draw (SampleImages), and one
that saves a checkpoint when a signal stops the training (PreemptionCheckpoint)."""

from bigmac_lightning.callbacks.pipeline_monitor import PipelineMonitor
from bigmac_lightning.callbacks.preemption_checkpoint import PreemptionCheckpoint
from bigmac_lightning.callbacks.sample_images import SampleImages

__all__ = ["PipelineMonitor", "PreemptionCheckpoint", "SampleImages"]
