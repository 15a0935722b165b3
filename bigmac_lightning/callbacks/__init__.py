"""Callbacks that show what the pipeline does (PipelineMonitor), what the generators draw (SampleImages) and what the
model replies (SampleReplies), and one that saves a checkpoint when a signal stops the training
(PreemptionCheckpoint)."""

from bigmac_lightning.callbacks.pipeline_monitor import PipelineMonitor
from bigmac_lightning.callbacks.preemption_checkpoint import PreemptionCheckpoint
from bigmac_lightning.callbacks.sample_images import SampleImages
from bigmac_lightning.callbacks.sample_replies import SampleReplies

__all__ = ["PipelineMonitor", "PreemptionCheckpoint", "SampleImages", "SampleReplies"]
