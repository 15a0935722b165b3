"""Learns from the peaks of batches how many bytes activations take, and says what the peaks of other plans will be."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import fmean

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.schedule.measured_costs import MeanWork, MeasuredCosts
from bigmac_lightning.training.planner import PlannedBatch

COMPONENTS = ("encoder", "llm", "generator")
"""The names under which a `MemoryTracker` counts."""

KEPT = 8
"""How many of the last peaks count: few, as something else may be trained from some batch on."""


def work_of(batch: Batch) -> MeanWork:
    """The work of a batch's mean microbatch."""
    given = batch.useful().microbatches or batch.microbatches
    media, targets = [i for m in given for i in m.media], [i for m in given for i in m.targets]
    llm = (sum(m.inputs["input_ids"].numel() for m in given), sum(m.cost for m in given))
    encoder = (len(media), sum(i.rows for i in media), sum(i.cost for i in media))
    generator = (len(targets), sum(i.cost for i in targets), sum(i.rows for i in targets))
    shape = max((tuple(i.shape) for i in targets), key=math.prod, default=())
    return MeanWork(*(number / max(len(given), 1) for number in (*llm, *encoder, *generator)), target_shape=shape)


def rows_of(work: MeanWork) -> tuple[float, float, float]:
    """By component, the amount of a microbatch that its activations grow with."""
    return work.rows, work.tokens, work.target_rows


def alive_rows(planned: PlannedBatch, batch: Batch) -> list[float]:
    """By component, of how many rows this rank holds activations at its peak, if a batch runs as planned: feature rows
    of encoders, tokens of the LLM, condition rows of generators."""
    return [alive * rows for alive, rows in zip(planned.alive, rows_of(work_of(batch)), strict=True)]


class ActivationBytes:
    """The bytes that activations take for each row of `alive_rows`, by component, on one rank."""

    def __init__(self) -> None:
        self._found: dict[tuple[tuple[str, ...], str], deque[float]] = {}

    def take(self, known: MeasuredCosts, rank: int, size: int) -> None:
        """Begin with what was measured before on the same stages.

        Args:
            rank, size: this rank of a pipeline of so many. The LLM's bytes of another number of ranks say nothing.
        """
        llm = known.rank_microbatches[rank] if len(known.rank_microbatches) == size else None
        units = (known.encoder_unit, llm, known.generator_unit)
        for name, unit, rows in zip(COMPONENTS, units, rows_of(known.work), strict=True):
            if unit is not None and rows:
                self._of(known.trained, name).append(unit / rows)

    def add(self, trained: tuple[str, ...], rows: Sequence[float], peaks: Mapping[str, float]) -> None:
        """Learn from what was measured.

        Args:
            trained: names of what is trained; see `Trained.names`. Peaks of something else say nothing about it.
            rows: by component, the most rows that were alive by the plans.
            peaks: the bytes that were alive at most, by the component's name.
        """
        for name, alive in zip(COMPONENTS, rows, strict=True):
            if alive:
                self._of(trained, name).append(peaks.get(name, 0) / alive)

    def expected(self, trained: tuple[str, ...], rows: Sequence[float]) -> dict[str, float]:
        """The bytes of so many rows, by the component's name, as far as they are known."""
        found = {name: self._of(trained, name) for name in COMPONENTS}
        known = zip(found.items(), rows, strict=True)
        return {name: fmean(sizes) * alive if alive else 0.0 for (name, sizes), alive in known if sizes or not alive}

    def _of(self, trained: tuple[str, ...], name: str) -> deque[float]:
        return self._found.setdefault((trained, name), deque(maxlen=KEPT))
