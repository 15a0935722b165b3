"""The LLM-only schedules that encoder and generator work is nested into, by name.

To add one: a file with a pure builder, and an entry here.
"""

from bigmac_lightning.schedule.backbones.base import Backbone, Orders, round_robin
from bigmac_lightning.schedule.backbones.gpipe import gpipe
from bigmac_lightning.schedule.backbones.one_f_one_b import one_f_one_b

__all__ = ["BACKBONES", "Backbone", "Orders", "get_backbone", "round_robin"]

BACKBONES: dict[str, Backbone] = {
    "gpipe": Backbone(gpipe),
    "1f1b": Backbone(one_f_one_b),
}


def get_backbone(name: str) -> Backbone:
    """The backbone of that name; ``ValueError`` lists the names if there is none."""
    if name not in BACKBONES:
        raise ValueError(f"backbone is {name!r}; expected one of {', '.join(BACKBONES)}")
    return BACKBONES[name]
