"""bigmac-lightning: encoder + LLM + generator models in a pipeline, with bounded activation memory and no added bubble.

Importing this package makes ``Trainer(strategy="bigmac")`` work. What it exports is imported when it is first asked
for, so that commands which need no model start without torch and Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bigmac_lightning import registration

if TYPE_CHECKING:
    from bigmac_lightning.contracts.batch import Batch, MediaItem, Microbatch, PipelineLayout, TargetItem
    from bigmac_lightning.contracts.components import Encoder, Generator, LanguageModel
    from bigmac_lightning.contracts.module import PipelineModule
    from bigmac_lightning.contracts.outputs import PipelineOutput
    from bigmac_lightning.contracts.owners import assign_owners
    from bigmac_lightning.loaded_run import LoadedRun, load
    from bigmac_lightning.schedule.budget import MemoryBudget
    from bigmac_lightning.schedule.costs import Costs
    from bigmac_lightning.schedule.request import ScheduleOptions
    from bigmac_lightning.training.options import ShardingOptions, StageOptions
    from bigmac_lightning.training.strategy import BigMacStrategy

__all__ = [
    "Batch",
    "BigMacStrategy",
    "Costs",
    "Encoder",
    "Generator",
    "LanguageModel",
    "LoadedRun",
    "MediaItem",
    "MemoryBudget",
    "Microbatch",
    "PipelineLayout",
    "PipelineModule",
    "PipelineOutput",
    "ScheduleOptions",
    "ShardingOptions",
    "StageOptions",
    "TargetItem",
    "assign_owners",
    "load",
]

_PLACES = {
    "contracts.batch": ("Batch", "MediaItem", "Microbatch", "PipelineLayout", "TargetItem"),
    "contracts.components": ("Encoder", "Generator", "LanguageModel"),
    "contracts.module": ("PipelineModule",),
    "contracts.outputs": ("PipelineOutput",),
    "contracts.owners": ("assign_owners",),
    "loaded_run": ("LoadedRun", "load"),
    "schedule.budget": ("MemoryBudget",),
    "schedule.costs": ("Costs",),
    "schedule.request": ("ScheduleOptions",),
    "training.options": ("ShardingOptions", "StageOptions"),
    "training.strategy": ("BigMacStrategy",),
}

registration.register()


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
