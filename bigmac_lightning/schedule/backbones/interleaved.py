"""Interleaved 1F1B (Narayanan et al. 2021, arXiv 2104.04473), with V stages per rank, in depth-first order.

The microbatches are divided into rounds: all microbatches of a round pass the first stage of a rank, then its next
stage, and so on. The paper requires rounds of P microbatches. To allow any M, this file makes max(1, M // P) rounds
whose sizes differ by at most one, similar to Llama 3's flexible schedule (arXiv 2407.21783, section 3.3.2) and equal to
torch's ScheduleInterleaved1F1B where all rounds have the same size.
"""

from itertools import pairwise

from bigmac_lightning.schedule.action import Action, Kind
from bigmac_lightning.schedule.backbones.base import Orders


def interleaved_1f1b(pipeline_parallel_size: int, microbatches: int, virtual_stages: int) -> Orders:
    """Return every rank's actions: warm-up forwards, then one forward and one backward in turn, then the last
    backwards.

    The warm-up of the last rank has the first round's forwards on all its stages but the last one. Each rank before it
    has two forwards more: one forward for each step of the way to the last rank, and one for each step of the way back.
    """
    rounds = _rounds(pipeline_parallel_size, microbatches)
    orders: Orders = []
    for rank in range(pipeline_parallel_size):
        stages = [chunk * pipeline_parallel_size + rank for chunk in range(virtual_stages)]
        forwards = _passes("F", rounds, stages)
        backwards = _passes("B", rounds, stages[::-1])
        warm_up = (virtual_stages - 1) * len(rounds[0]) + 2 * (pipeline_parallel_size - 1 - rank)
        actions = forwards[:warm_up]
        for step, backward in enumerate(backwards):
            actions += [*forwards[warm_up + step : warm_up + step + 1], backward]
        orders.append(actions)
    return orders


def _rounds(size: int, microbatches: int) -> list[range]:
    """Return rounds of consecutive microbatches. The longer rounds come first, so that the warm-up, whose length
    follows from the first round, is long enough for all rounds."""
    number = max(1, microbatches // size)
    length, longer = divmod(microbatches, number)
    starts = [index * length + min(index, longer) for index in range(number + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


def _passes(kind: Kind, rounds: list[range], stages: list[int]) -> list[Action]:
    """Return the actions of one kind in the order in which the rounds pass these stages."""
    return [Action(kind, microbatch, stage) for members in rounds for stage in stages for microbatch in members]
