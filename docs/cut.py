"""Draws the picture of a cut in how_it_works.md, from a plan: an SVG that takes its colours from the page."""

from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.draw import COLOURS, Span, spans_of
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.request import PlanRequest
from bigmac_lightning.schedule.verify import verify

RANKS, MICROBATCHES, CUT, PAUSE = 3, 6, 7.5, 3
UNIT, ROW, LEFT, GAP = 26, 24, 46, 34
"""Pixels of a unit of time, of a row, of the names of ranks, and between the two halves."""


def picture() -> str:
    """A step of 1F1B with a line at the cut; and below it the same step, in which all that starts later is delayed."""
    plan = make_plan(
        PlanRequest(pipeline_parallel_size=RANKS, microbatches=MICROBATCHES, costs=Costs(F=1, B=2, EF=0, EB=0))
    )
    bare = spans_of(plan, verify(plan))
    delayed = [[(action, *_late(start, end)) for action, start, end in row] for row in bare]
    below = RANKS * ROW + GAP
    width = LEFT + UNIT * (max(end for row in delayed for *_, end in row)) + 2
    parts = [*_rows(bare, 18), *_rows(delayed, 18 + below), *_pauses(bare, 18 + below)]
    x, bottom = LEFT + UNIT * CUT, 18 + RANKS * ROW
    parts.append(f'<path d="M{x} 14V{bottom + 4}" stroke="#c1121f" stroke-width="2" stroke-dasharray="5 3"/>')
    parts.append(f'<text x="{x}" y="10" fill="#c1121f">the cut</text>')
    height = 18 + below + RANKS * ROW + 4
    return (
        f'<svg viewBox="0 0 {width:g} {height}" role="img" aria-label="A step, and the same with a pause at a cut" '
        f'font-size="11" text-anchor="middle" style="width: 100%">{"".join(parts)}</svg>'
    )


def _late(start: float, end: float) -> tuple[float, float]:
    return (start + PAUSE, end + PAUSE) if start >= CUT else (start, end)


def _box(start: float, end: float, y: float, fill: str, text: str, more: str = "") -> str:
    x, width = LEFT + UNIT * start, UNIT * (end - start)
    return (
        f'<rect x="{x:g}" y="{y + 1:g}" width="{width - 1:g}" height="{ROW - 2}" fill="{fill}" {more}/>'
        f'<text x="{x + width / 2:g}" y="{y + ROW / 2 + 4:g}" fill="#101418">{text}</text>'
    )


def _rows(ranks: list[list[Span]], top: int) -> list[str]:
    parts: list[str] = []
    for rank, row in enumerate(ranks):
        y = top + rank * ROW
        parts.append(f'<text x="0" y="{y + ROW / 2 + 4:g}" text-anchor="start" fill="currentColor">rank {rank}</text>')
        parts += [_box(start, end, y, COLOURS[action.kind], str(action)) for action, start, end in row]
    return parts


def _pauses(bare: list[list[Span]], top: int) -> list[str]:
    """On each rank, the pause, which begins as soon as what runs at the cut has ended."""
    begins = [max([CUT, *(end for _, start, end in row if start < CUT)]) for row in bare]
    return [
        _box(begin, begin + PAUSE, top + rank * ROW, COLOURS["EF"], "pause", 'stroke="#c1121f"')
        for rank, begin in enumerate(begins)
    ]
