"""bigmac-lightning: encoder + LLM + generator models in a pipeline, with bounded activation memory and no added bubble.

Importing this package makes ``Trainer(strategy="bigmac")`` work. What it exports is imported when it is first asked
for, so that commands which need no model start without torch and Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bigmac_lightning import registration

if TYPE_CHECKING:
    from bigmac_lightning.batch import Batch, MediaItem, Microbatch, PipelineLayout, TargetItem, assign_owners
    from bigmac_lightning.components import Encoder, Generator, LanguageModel
    from bigmac_lightning.module import PipelineModule, PipelineOutput
    from bigmac_lightning.strategy import BigMacStrategy

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

_PLACES = {
    "batch": ("Batch", "MediaItem", "Microbatch", "PipelineLayout", "TargetItem", "assign_owners"),
    "components": ("Encoder", "Generator", "LanguageModel"),
    "module": ("PipelineModule", "PipelineOutput"),
    "strategy": ("BigMacStrategy",),
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
