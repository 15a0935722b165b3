"""The backbones, by name: LLM-only schedules, around which the policies place encoder and generator work.

To add a backbone, write a file with a pure builder function and add an entry to ``BACKBONES``. Users can also pass the
name of a file with a backbone, see ``files``.
"""

from bigmac_lightning.schedule.backbones.base import Backbone, Orders, round_robin, v_shape
from bigmac_lightning.schedule.backbones.dualpipev import dualpipev
from bigmac_lightning.schedule.backbones.files import SUFFIXES, read_backbone
from bigmac_lightning.schedule.backbones.gpipe import gpipe
from bigmac_lightning.schedule.backbones.interleaved import interleaved_1f1b
from bigmac_lightning.schedule.backbones.looped_bfs import looped_bfs
from bigmac_lightning.schedule.backbones.one_f_one_b import one_f_one_b
from bigmac_lightning.schedule.backbones.zb1p import zb1p
from bigmac_lightning.schedule.backbones.zbv import zbv

__all__ = ["BACKBONES", "Backbone", "Orders", "get_backbone", "round_robin", "v_shape"]

ANY = range(1, 1001)
"""Numbers of stages per rank of the backbones that allow any number; no LLM has 1000 layers per rank."""

BACKBONES: dict[str, Backbone] = {
    "gpipe": Backbone(gpipe),
    "1f1b": Backbone(one_f_one_b),
    "interleaved_1f1b": Backbone(interleaved_1f1b, ANY),
    "looped_bfs": Backbone(looped_bfs, ANY),
    "zb1p": Backbone(zb1p, splits=True),
    "zbv": Backbone(zbv, (2,), v_shape, splits=True),
    "dualpipev": Backbone(dualpipev, (2,), v_shape, splits=True),
}


def get_backbone(name: str) -> Backbone:
    """Return the backbone with this name, or the one in this .csv or .json file.

    Raises:
        ValueError: there is no such backbone (the message lists the names), or the file is wrong.
    """
    if name.endswith(SUFFIXES):
        return read_backbone(name)
    if name not in BACKBONES:
        raise ValueError(f"backbone is {name!r}; expected one of {', '.join(BACKBONES)}, or a .csv or .json file")
    return BACKBONES[name]
