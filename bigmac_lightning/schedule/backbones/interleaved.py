"""Interleaved 1F1B (Narayanan et al. 2021, arXiv 2104.04473), depth first, with V stages per rank.

Microbatches go in rounds: all microbatches of a round pass one stage of a rank, then its next one. The paper wants
rounds of P microbatches; here M // P rounds of as equal sizes as possible take any M (as does Llama 3's flexible
schedule, section 3.3.2 of arXiv 2407.21783, and torch where all rounds are equal). With M < P there is one round.
"""

from itertools import pairwise

from bigmac_lightning.schedule.action import Action, Kind
from bigmac_lightning.schedule.backbones.base import Orders


def interleaved_1f1b(pipeline_parallel_size: int, microbatches: int, virtual_stages: int) -> Orders:
    """Every rank's actions: a warm-up of V - 1 stages of the first round and 2 more forwards per later rank."""
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
    """Consecutive microbatches, the longer rounds first: no later round then needs more warm-up than the first."""
    number = max(1, microbatches // size)
    length, longer = divmod(microbatches, number)
    starts = [index * length + min(index, longer) for index in range(number + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


def _passes(kind: Kind, rounds: list[range], stages: list[int]) -> list[Action]:
    return [Action(kind, microbatch, stage) for members in rounds for stage in stages for microbatch in members]
