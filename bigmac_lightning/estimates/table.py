"""Estimates of ranks as a table, for the terminal and for logs."""

from collections.abc import Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table

from bigmac_lightning.estimates.ranks import RankEstimate
from bigmac_lightning.schedule.budget import size_text


def partition_table(ranks: Sequence[RankEstimate]) -> Table:
    """A line for each rank: layers, parameters and time; memory and TFLOP only where they are estimated."""
    kinds, gathers = list(ranks[0].activations), any(rank.gathered for rank in ranks)
    offloads = any(rank.offloaded for rank in ranks)
    table = Table(title="stages of the LLM; times are estimated", title_justify="left", caption_justify="left")
    for heading in ("rank", "layers", "LLM parameters", "encoders + generators", "of the LLM's time"):
        table.add_column(heading, justify="right")
    if kinds:
        table.title = "estimated needs of each rank"
        for heading in (
            "static memory",
            *["whole weights, peak"] * gathers,
            *(f"{kind}, peak" for kind in kinds),
            "memory",
            *["offloaded"] * offloads,
            "TFLOP per step",
        ):
            table.add_column(heading, justify="right")
    for number, rank in enumerate(ranks):
        sizes = [rank.static, *[rank.gathered] * gathers, *rank.activations.values(), rank.memory]
        sizes += [rank.offloaded] * offloads
        table.add_row(
            str(number),
            ", ".join(f"{stage.start}..{stage.stop - 1}" for stage in rank.layers) or "none",
            count_text(rank.llm),
            count_text(rank.replicated),
            f"{rank.share:.1%}",
            *(size_text(size) for size in sizes if kinds),
            *([f"{rank.tflop:.4g}"] if kinds else []),
        )
    return table


def as_text(table: Table) -> str:
    """The table as plain text, 120 columns wide."""
    file = StringIO()
    Console(file=file, width=120).print(table)
    return file.getvalue()


def count_text(count: float) -> str:
    """A number of parameters in three or four digits, such as "30.53 B"."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.2f} {letter}"
    return f"{count:g}"
