"""Shows plans and executed steps: tables and timelines for the terminal, pictures for files.

The functions return objects that `rich` can print, or write a file; they print nothing themselves. Only pictures need
matplotlib, which is imported when one is drawn.
"""

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from bigmac_lightning.schedule.action import Action, Kind
from bigmac_lightning.schedule.budget import MemoryBudget, size_text
from bigmac_lightning.schedule.liveness import encoder_unit_steps, llm_microbatch_steps
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.simulate import Timeline
from bigmac_lightning.schedule.workload import Workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Span = tuple[Action, float, float]
"""An action with its start time and its end time."""

Curve = list[tuple[float, float]]
"""Pairs (time, amount from then on) in order of time."""

COLOURS: dict[Kind, str] = {
    "F": "#8ecae6",
    "B": "#219ebc",
    "I": "#3fb8ad",
    "W": "#a7c957",
    "EF": "#ffd166",
    "EB": "#f4a261",
    "G": "#c8a2d8",
}
"""Colour of each kind of action, in the terminal and in pictures. Blue and green are the LLM's; yellow, orange and
violet are those of encoder and generator."""

BESIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "fontsize": 7, "frameon": False}
"""Arguments of matplotlib that put a legend to the right of the axes, where it hides nothing."""


def table(plan: Plan, timeline: Timeline, bound: float | None = None, memory: Sequence[float] | None = None) -> Table:
    """Return a table with the makespan, the ideal and the bubble share in its title, and each rank's bubble (idle time)
    and peaks in its rows.

    Args:
        plan: the plan.
        timeline: the result of ``simulate`` or ``verify`` for the plan.
        bound: the result of ``lower_bound`` for the plan, which is printed below the table.
        memory: per rank, the peak of the memory in use, in bytes, which gets a column.
    """
    share, ratio = timeline.bubble_share, timeline.makespan / plan.ideal if plan.ideal else float("nan")
    title = (
        f"{plan.policy} on {plan.backbone}: {plan.pipeline_parallel_size} ranks, {plan.microbatches} microbatches, "
        f"{len(plan.groups)} groups\n"
        f"makespan {timeline.makespan:g}, ideal {plan.ideal:g}, ratio {ratio:.4f}, bubbles {share:.1%}"
    )
    result = Table(title=title, title_justify="left", caption_justify="left")
    if bound:
        gap = f"{max(0.0, timeline.makespan / bound - 1):.1%}"
        verdict = "this is the optimum" if gap == "0.0%" else f"at most {gap} above the optimum"
        result.caption = f"lower bound {bound:g}; {verdict}\nof this backbone's order, groups, shares and encoder units"
    headings = ["rank", "actions", "bubble", "bubble share", "peak encoder units", "peak LLM microbatches"]
    for heading in headings + ["peak memory"] * (memory is not None):
        result.add_column(heading, justify="right")
    for rank, actions in enumerate(plan.ranks):
        bubble = timeline.bubbles[rank]
        result.add_row(
            str(rank),
            str(len(actions)),
            f"{bubble:g}",
            f"{bubble / timeline.makespan:.1%}" if timeline.makespan else "-",
            f"{timeline.encoder_units[rank]:.3g}",
            f"{timeline.llm_microbatches[rank]:g}",
            *([size_text(memory[rank])] if memory is not None else []),
        )
    return result


class TerminalTimeline:
    """A timeline for the terminal with one line per rank; several bands of lines if the terminal is too narrow for one.

    A block that is too narrow for its action's text is filled with a letter: F, B, I, W, or f, b, g for EF, EB, G.

    Args:
        ranks: per rank, the spans of its actions in order of time.
        bands: the largest number of bands; the scale of time is chosen so that the timeline fits into them.
    """

    def __init__(self, ranks: Sequence[Sequence[Span]], bands: int = 6) -> None:
        self._ranks, self._bands = ranks, bands

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        label = len(f"rank {len(self._ranks) - 1} ")
        width = max(20, options.max_width - label)
        finish = max((end for spans in self._ranks for _, _, end in spans), default=0.0)
        lengths = [
            (end - start) / len(str(action)) for spans in self._ranks for action, start, end in spans if end > start
        ]
        if not lengths:
            return
        columns = min(round(finish / min(lengths)), width * self._bands)
        rows = [self._row(spans, columns, columns / finish) for spans in self._ranks]
        for left in range(0, columns, width):
            begin, end = left * finish / columns, min(left + width, columns) * finish / columns
            yield Text(f"time {begin:.4g} to {end:.4g}", style="dim")
            for rank, row in enumerate(rows):
                yield Text(f"rank {rank}".ljust(label)) + row[left : left + width]

    @staticmethod
    def _row(spans: Sequence[Span], columns: int, scale: float) -> Text:
        row, filled = Text(no_wrap=True), 0
        for action, start, end in spans:
            left, right = max(filled, round(start * scale)), round(end * scale)
            if right <= left:
                continue
            row.append("·" * (left - filled), "dim")
            text = str(action)
            letter = action.kind[-1].lower() if action.nested else action.kind
            block = text.center(right - left) if len(text) <= right - left else letter * (right - left)
            row.append(block, Style(color="black", bgcolor=COLOURS[action.kind]))
            filled = right
        row.append("·" * (columns - filled), "dim")
        return row


def spans_of(plan: Plan, timeline: Timeline) -> list[list[Span]]:
    """Per rank, the spans of the actions of a simulated plan."""
    return [
        list(zip(actions, timeline.starts[rank], timeline.ends[rank], strict=True))
        for rank, actions in enumerate(plan.ranks)
    ]


def picture(
    plan: Plan,
    timeline: Timeline,
    path: str | PathLike[str],
    workload: Workload | None = None,
    memory: MemoryBudget | None = None,
) -> None:
    """Write a picture of a simulated plan: its actions, and below them curves over time of each rank's live encoder
    units and LLM microbatches.

    Args:
        plan: the plan.
        timeline: the result of ``simulate`` or ``verify`` for the plan.
        path: a file name that ends with .png, .svg or .pdf.
        workload: the workload that the timeline was simulated with.
        memory: if given, the picture also has a curve of each rank's memory in use, in GiB.
    """
    ratio = f", {timeline.makespan / plan.ideal:.3f} of the ideal" if plan.ideal else ""
    title = f"{plan_title(plan)}: makespan {timeline.makespan:g}{ratio}, bubbles {timeline.bubble_share:.1%}"
    _write(spans_of(plan, timeline), path, title, "time", alive_curves(plan, timeline, workload, memory))


def plan_title(plan: Plan) -> str:
    """The plan's policy, backbone and size, in words."""
    stages = f" with {plan.virtual_stages} stages per rank" if plan.virtual_stages > 1 else ""
    return (
        f"{plan.policy} on {plan.backbone}{stages}, {plan.pipeline_parallel_size} ranks, "
        f"{plan.microbatches} microbatches"
    )


def alive_curves(
    plan: Plan, timeline: Timeline, workload: Workload | None = None, memory: MemoryBudget | None = None
) -> dict[str, list[Curve]]:
    """By the name of what is counted, each rank's curve of how much of it is alive in a simulated plan: encoder units,
    LLM microbatches and, if `memory` is given, GiB in use."""
    panels: dict[str, list[Curve]] = {}
    if plan.encoder_shares:
        panels["encoder units"] = _curves(timeline, encoder_unit_steps(plan, workload))
    panels["LLM microbatches"] = _curves(timeline, llm_microbatch_steps(plan))
    if memory is not None:
        used = [[(a / 2**30, b / 2**30) for a, b in row] for row in memory.steps(plan, workload)]
        panels["memory, GiB"] = _curves(timeline, used)
    return panels


def measured_curves(memory: Sequence[Sequence[tuple[float, str, int]]]) -> dict[str, list[Curve]]:
    """By the name of a component with its unit, each rank's curve of the MiB alive, from triples (seconds, component,
    bytes alive from then on)."""
    return {
        f"{component}, MiB": [[(time, size / 2**20) for time, name, size in row if name == component] for row in memory]
        for component in dict.fromkeys(name for row in memory for _, name, _ in row)
    }


def _curves(timeline: Timeline, steps: Sequence[Sequence[tuple[float, float]]]) -> list[Curve]:
    """Per rank, (time, amount) pairs at each change, from the amounts during and after each action."""
    curves: list[Curve] = []
    for starts, ends, row in zip(timeline.starts, timeline.ends, steps, strict=True):
        points: dict[float, float] = {}  # where several changes have the same time, the last one is drawn
        for start, end, (during, after) in zip(starts, ends, row, strict=True):
            points[start] = during
            points[end] = after
        curves.append(list(points.items()))
    return curves


def measured_picture(
    ranks: Sequence[Sequence[Span]],
    path: str | PathLike[str],
    title: str = "as executed",
    memory: Sequence[Sequence[tuple[float, str, int]]] | None = None,
) -> None:
    """Write a picture of an executed step.

    Args:
        ranks: per rank, the spans of the executed actions, in seconds.
        path: a file name that ends with .png, .svg or .pdf.
        title: the title of the picture.
        memory: per rank, a triple (seconds, component, bytes alive from then on) at each change.
    """
    _write(ranks, path, title, "seconds", measured_curves(memory or []))


def compared_picture(timelines: Mapping[str, Sequence[Sequence[Span]]], path: str | PathLike[str], unit: str) -> None:
    """Write a picture of several timelines, one below the other, on the same scale of time.

    Args:
        timelines: by their titles, which are followed by their makespans: per rank, the spans of its actions.
        path: a file name that ends with .png, .svg or .pdf.
        unit: what the axis of time is called.
    """
    from matplotlib.figure import Figure

    finish = max(end for ranks in timelines.values() for spans in ranks for _, _, end in spans)
    plot = 9.0  # width in inches
    heights = [0.3 * len(ranks) + 0.4 for ranks in timelines.values()]
    figure = Figure(figsize=(plot + 1.5, sum(heights) + 0.4), layout="constrained")
    axes = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for axis, (title, ranks) in zip(axes, timelines.items(), strict=True):
        makespan = max(end for spans in ranks for _, _, end in spans)
        axis.set_title(f"{title}: {makespan:.1f}", loc="left", fontsize=10)
        _draw_spans(axis, ranks, 0.0, finish, points=72 * plot / finish)
    axes[-1].set_xlabel(unit)
    axes[-1].set_xlim(0.0, finish)
    figure.savefig(path, dpi=150)


def _write(
    ranks: Sequence[Sequence[Span]],
    path: str | PathLike[str],
    title: str,
    unit: str,
    panels: dict[str, list[Curve]],
) -> None:
    """Write the spans as the top panel, and each set of curves as a panel below it with one curve per rank."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    begin = min((spans[0][1] for spans in ranks if spans), default=0.0)
    finish = max((end for spans in ranks for _, _, end in spans), default=1.0)
    longest = max((len(spans) for spans in ranks), default=1)
    plot = min(max(8.0, 0.34 * longest), 60.0)  # width in inches, such that the texts of most actions fit
    heights = [max(1.2, 0.45 * len(ranks) + 0.6)] + [1.5] * len(panels)
    figure = Figure(figsize=(plot + 1.8, sum(heights) + 0.6), layout="constrained")
    axes = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    axes[0].set_title(title, loc="left", fontsize=10)
    _draw_spans(axes[0], ranks, begin, finish, points=72 * plot / (finish - begin))
    colours = colormaps["viridis"].resampled(len(ranks) + 1)  # its last colour is too pale, and is not used
    for axis, (name, curves) in zip(axes[1:], panels.items(), strict=True):
        for rank, curve in enumerate(curves):
            times, values = [begin, *(t for t, _ in curve), finish], [0.0, *(value for _, value in curve)]
            width = 0.8 + 2 * (len(curves) - 1 - rank) / len(curves)  # thinner on top: curves that coincide all show
            axis.step(times, [*values, values[-1]], where="post", linewidth=width, color=colours(rank))
        axis.set_ylabel(name, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    if panels:
        lines = [Line2D([], [], color=colours(rank), label=f"rank {rank}") for rank in range(len(ranks))]
        axes[1].legend(handles=lines, ncols=-(-len(ranks) // 8), **BESIDE)
    axes[-1].set_xlabel(unit)
    axes[-1].set_xlim(begin, finish)
    figure.savefig(path, dpi=120)


def _draw_spans(axis: "Axes", ranks: Sequence[Sequence[Span]], begin: float, finish: float, points: float) -> None:
    """Draw one row per rank on a hatched background, which remains visible in bubbles.

    `points` is the width of one unit of time in the picture, in typographic points.
    """
    from matplotlib.patches import Patch

    seen: dict[str, Patch] = {}
    for rank, spans in enumerate(ranks):
        axis.barh(
            rank,
            finish - begin,
            left=begin,
            height=0.9,
            color="#f4f4f4",
            edgecolor="#d5d5d5",
            hatch="////",
            linewidth=0,
        )
        for action, start, end in spans:
            colour = COLOURS[action.kind]
            seen.setdefault(action.kind, Patch(facecolor=colour, label=action.kind))
            axis.barh(rank, end - start, left=start, height=0.9, color=colour, edgecolor="black", linewidth=0.3)
            for text, size in _fitting(str(action), (end - start) * points):
                axis.text((start + end) / 2, rank, text, ha="center", va="center", fontsize=size, clip_on=True)
    seen["bubble"] = Patch(facecolor="#f4f4f4", edgecolor="#d5d5d5", hatch="////", label="bubble")
    axis.legend(handles=[seen[kind] for kind in (*COLOURS, "bubble") if kind in seen], **BESIDE)
    axis.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))], fontsize=8)
    axis.set_ylim(len(ranks) - 0.5, -0.5)


def _fitting(text: str, points: float) -> Iterator[tuple[str, float]]:
    """Yield the text with the font size that fits into this width; nothing if that size is too small to read."""
    size = min(8.0, points / (0.7 * len(text)))
    if size >= 3:
        yield text, size
