"""bigmac-lightning: encoder + LLM + generator models in a pipeline, with bounded activation memory and no added bubble.

Importing this package registers ``Trainer(strategy="bigmac")``.
"""

from bigmac_lightning.batch import Batch, MediaItem, Microbatch, PipelineLayout, TargetItem, assign_owners
from bigmac_lightning.components import Encoder, Generator, LanguageModel
from bigmac_lightning.module import PipelineModule, PipelineOutput
from bigmac_lightning.strategy import BigMacStrategy, register

register()

__all__ = [
    "Batch",
    "BigMacStrategy",
    "Encoder",
    "Generator",
    "LanguageModel",
    "MediaItem",
    "Microbatch",
    "PipelineLayout",
    "PipelineModule",
    "PipelineOutput",
    "TargetItem",
    "assign_owners",
]
