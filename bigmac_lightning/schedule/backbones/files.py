"""A user's own backbone: every rank's actions from a CSV or JSON file.

CSV: one line per rank, one action per cell, empty cells ignored; what torch's pipeline schedules dump, if they dump
computations only. JSON: a list with a list of action texts per rank. Stages live where their actions are.
"""

import csv
from pathlib import Path

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.backbones.base import Backbone, Orders
from bigmac_lightning.schedule.reading import parse_json, read_text

SUFFIXES = (".csv", ".json")


def read_backbone(path: str) -> Backbone:
    """The backbone of a file, for as many ranks and at most as many microbatches as the file has.

    What is left of a schedule without its last microbatches is a schedule, too.

    Raises:
        ValueError: names the file, the rank and the cell, and what is expected.
    """
    orders = [_actions(path, rank, row) for rank, row in enumerate(_rows(path))]
    if not any(orders):
        raise ValueError(f"{path}: expected a line of actions such as '0F0' per rank, found none")
    stage_rank = _stage_rank(path, orders)
    stages = len(stage_rank) // len(orders)
    for rank in range(len(orders)):
        if stage_rank.count(rank) != stages:
            raise ValueError(f"{path}: rank {rank} has {stage_rank.count(rank)} stages; expected {stages} on each rank")
    microbatches = 1 + max(action.index for actions in orders for action in actions)

    def build(size: int, wanted: int, _: int) -> Orders:
        if size != len(orders):
            raise ValueError(f"{path} is a backbone of {len(orders)} ranks; pipeline_parallel_size is {size}")
        if wanted > microbatches:
            raise ValueError(
                f"{path} is a backbone of {microbatches} microbatches; {wanted} are needed, counting those that are "
                "in flight because of a generator (extra_in_flight)"
            )
        return [[action for action in actions if action.index < wanted] for actions in orders]

    return Backbone(build, (stages,), lambda size, virtual_stages: list(stage_rank))


def _rows(path: str) -> list[list[str]]:
    if Path(path).suffix == ".csv":
        lines = csv.reader(read_text(path, ValueError).splitlines())
        return [[cell.strip() for cell in row if cell.strip()] for row in lines if row]
    rows = parse_json(read_text(path, ValueError), path, ValueError)
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{path}: expected a list with a list of action texts per rank")
    return [[str(cell) for cell in row] for row in rows]


def _actions(path: str, rank: int, row: list[str]) -> list[Action]:
    """A rank's actions; each stage's forwards must come in the order of the microbatches."""
    actions: list[Action] = []
    forwards: dict[int, int] = {}
    for text in row:
        try:
            action = Action.parse(text)
        except ValueError as problem:
            raise ValueError(f"{path}: rank {rank}: {problem}") from None
        if action.stage is None:
            raise ValueError(f"{path}: rank {rank}: {text} is not of the LLM; a backbone has F, B, I and W only")
        if action.kind == "F":
            expected = forwards.get(action.stage, 0)
            if action.index != expected:
                raise ValueError(
                    f"{path}: rank {rank}: found {text}, expected {action.stage}F{expected}, as forwards "
                    "of a stage come in the order of the microbatches"
                )
            forwards[action.stage] = expected + 1
        actions.append(action)
    return actions


def _stage_rank(path: str, orders: Orders) -> list[int]:
    owner: dict[int, int] = {}
    for rank, actions in enumerate(orders):
        for action in actions:
            assert action.stage is not None
            if owner.setdefault(action.stage, rank) != rank:
                raise ValueError(f"{path}: stage {action.stage} is on ranks {owner[action.stage]} and {rank}")
    if sorted(owner) != list(range(len(owner))):
        raise ValueError(f"{path}: has the stages {sorted(owner)}; expected 0 .. {len(owner) - 1}")
    return [owner[stage] for stage in range(len(owner))]
