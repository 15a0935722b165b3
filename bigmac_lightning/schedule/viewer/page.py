"""Writes timelines as one HTML file, which shows them in any browser and loads nothing else."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from bigmac_lightning.schedule.action import Kind
from bigmac_lightning.schedule.budget import MemoryBudget
from bigmac_lightning.schedule.draw import COLOURS, Curve, Span, alive_curves, measured_curves, spans_of
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.simulate import Timeline
from bigmac_lightning.schedule.workload import Workload

PLACE = '{"of": "the page\'s data"}'
"""What the template has in place of the data."""

KINDS: dict[Kind, str] = {
    "F": "forward",
    "B": "backward",
    "I": "input gradients",
    "W": "weight gradients",
    "EF": "encoder forward",
    "EB": "encoder backward",
    "G": "generator forward and backward",
}
"""What each kind of action is called on the page."""

TOGETHER = "All timelines have one scale of time, in the unit of the costs."


@dataclass(frozen=True)
class Track:
    """One timeline of the page: a row per rank, and curves below.

    Attributes:
        name: what the timeline is, such as "planned" or "executed".
        ranks: per rank, the spans of its actions in order of time.
        unit: the unit of its times: "s", or "" if they are in the unit of the plan's costs.
        groups: the microbatches of each group.
        curves: by name, a curve per rank.
        ideal: see ``Plan``; ``None`` for an executed timeline.
    """

    name: str
    ranks: Sequence[Sequence[Span]]
    unit: str
    groups: Sequence[Sequence[int]]
    curves: Mapping[str, Sequence[Curve]] = field(default_factory=dict[str, list[Curve]])
    ideal: float | None = None

    @property
    def makespan(self) -> float:
        """The time when the last action ends."""
        return max((end for spans in self.ranks for _, _, end in spans), default=0.0)

    @property
    def bubble_share(self) -> float:
        """The fraction of the makespan in which the mean rank runs no action."""
        whole = self.makespan * len(self.ranks)
        return 1 - sum(end - start for spans in self.ranks for _, start, end in spans) / whole if whole else 0.0


def planned_track(
    plan: Plan,
    timeline: Timeline,
    workload: Workload | None = None,
    memory: MemoryBudget | None = None,
    seconds: bool = False,
    name: str = "planned",
) -> Track:
    """A simulated plan, with curves of what is alive.

    Args:
        plan: the plan.
        timeline: the result of ``simulate`` or ``verify`` for the plan.
        workload: the workload that the timeline was simulated with.
        memory: if given, there is also a curve of each rank's memory in use.
        seconds: whether the plan's costs are in seconds.
        name: what the timeline is called.
    """
    curves = alive_curves(plan, timeline, workload, memory)
    return Track(name, spans_of(plan, timeline), "s" if seconds else "", plan.groups, curves, plan.ideal)


def executed_track(
    ranks: Sequence[Sequence[Span]],
    groups: Sequence[Sequence[int]],
    memory: Sequence[Sequence[tuple[float, str, int]]] | None = None,
) -> Track:
    """An executed step, whose time 0 is the start of its first action.

    Args:
        ranks: per rank, the spans of the executed actions, in seconds.
        groups: the microbatches of each group.
        memory: per rank, a triple (seconds, component, bytes alive from then on) at each change.
    """
    begin = min((spans[0][1] for spans in ranks if spans), default=0.0)
    spans = [[(action, start - begin, end - begin) for action, start, end in row] for row in ranks]
    curves = measured_curves([[(time - begin, name, size) for time, name, size in row] for row in memory or []])
    return Track("executed", spans, "s", groups, curves)


def write_page(path: Path | str, title: str, tracks: Sequence[Track]) -> None:
    """Write the page.

    If all tracks have the same unit, they have one scale of time; else each has its makespan as its width, and the page
    says so.

    Args:
        path: the file.
        title: the page's title.
        tracks: the timelines, from top to bottom. Actions with the same text on the same rank are the same action.
    """
    data = {
        "title": title,
        "note": _note(tracks),
        "shared": _shared(tracks),
        "colours": COLOURS,
        "kinds": KINDS,
        "tracks": [_track(track) for track in tracks],
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")  # no </script> within it
    template = files("bigmac_lightning.schedule.viewer").joinpath("timeline.html").read_text(encoding="utf-8")
    assert template.count(PLACE) == 1
    Path(path).write_text(template.replace(PLACE, text), encoding="utf-8")


def _shared(tracks: Sequence[Track]) -> bool:
    return len({track.unit for track in tracks}) == 1


def _note(tracks: Sequence[Track]) -> str:
    if not any(track.unit for track in tracks):
        return "Times are in the unit of the plan's costs." if len(tracks) == 1 else TOGETHER
    if len(tracks) == 1:
        return ""
    if _shared(tracks):
        return (
            "All timelines are in seconds and have one scale of time: the plan was made from measured times. "
            "Time 0 is the start of the first action."
        )
    return (
        "The plan's times are in the unit of its costs, not in seconds, as it was made before times were measured. "
        "So each timeline is drawn as wide as its own makespan: compare shapes, not lengths."
    )


def _track(track: Track) -> dict[str, Any]:
    return {
        "name": track.name,
        "unit": track.unit,
        "groups": track.groups,
        "makespan": track.makespan,
        "bubbles": track.bubble_share,
        "ideal": track.ideal,
        "ranks": [[(str(action), start, end) for action, start, end in row] for row in track.ranks],
        "curves": [{"name": name, "ranks": rows} for name, rows in track.curves.items()],
    }
