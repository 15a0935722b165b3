"""Reads a user's own backbone, that is, every rank's actions, from a CSV or JSON file.

A CSV file has one line per rank and one action per cell; empty cells are ignored. This is the format in which torch's
pipeline schedules dump their computations. A JSON file has a list of action texts per rank, in one list. The rank of
each stage is the one that has its actions.
"""

import csv
from functools import lru_cache
from pathlib import Path

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.backbones.base import Backbone, Orders
from bigmac_lightning.schedule.reading import parse_json, read_text

SUFFIXES = (".csv", ".json")


def read_backbone(path: str) -> Backbone:
    """Return the backbone in a file, for the file's number of ranks and at most its number of microbatches.

    For fewer microbatches the actions of the last ones are left out. The rest is a valid schedule, because no action
    needs one of another microbatch.

    Raises:
        ValueError: the file is wrong; names the file, the rank, the action and what is expected. The backbone's builder
            raises it for another number of ranks or for too many microbatches.
    """
    try:
        changed = Path(path).stat().st_mtime_ns
    except OSError:
        changed = 0  # reading the file raises the error that says what is wrong
    return _read(path, changed)


@lru_cache(maxsize=8)  # every batch is planned with its backbone; more files than these are hardly used in one run
def _read(path: str, changed: int) -> Backbone:
    """Read the backbone of a file that was last changed at this time (nanoseconds)."""
    orders = [_actions(path, rank, row) for rank, row in enumerate(_rows(path))]
    if not any(orders):
        raise ValueError(f"{path}: expected a line of actions such as '0F0' per rank, found none")
    stage_rank = _stage_rank(path, orders)
    stages = len(stage_rank) // len(orders)
    for rank in range(len(orders)):
        if stage_rank.count(rank) != stages:
            raise ValueError(f"{path}: rank {rank} has {stage_rank.count(rank)} stages; expected {stages} on each rank")
    microbatches = 1 + max(action.index for actions in orders for action in actions)

    def build(size: int, requested: int, _: int) -> Orders:
        if size != len(orders):
            raise ValueError(f"{path} is a backbone of {len(orders)} ranks; pipeline_parallel_size is {size}")
        if requested > microbatches:
            raise ValueError(
                f"{path} is a backbone of {microbatches} microbatches; {requested} are needed, counting those that are "
                "in flight because of a generator (extra_in_flight)"
            )
        return [[action for action in actions if action.index < requested] for actions in orders]

    splits = any(action.kind == "W" for actions in orders for action in actions)
    return Backbone(build, (stages,), lambda size, virtual_stages: list(stage_rank), splits)


def _rows(path: str) -> list[list[str]]:
    """Return the texts of each rank's actions."""
    if Path(path).suffix == ".csv":
        lines = csv.reader(read_text(path, ValueError).splitlines())
        return [[cell.strip() for cell in row if cell.strip()] for row in lines if row]
    rows = parse_json(read_text(path, ValueError), path, ValueError)
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{path}: expected a list with a list of action texts per rank")
    return [[str(cell) for cell in row] for row in rows]


def _actions(path: str, rank: int, row: list[str]) -> list[Action]:
    """Return a rank's actions.

    Raises:
        ValueError: a text is not an F, B, I or W action, or a stage does not forward the microbatches in their order
            (as ``Backbone.build`` requires for extra microbatches in flight).
    """
    actions: list[Action] = []
    forwards: dict[int, int] = {}
    for text in row:
        try:
            action = Action.parse(text)
        except ValueError as problem:
            raise ValueError(f"{path}: rank {rank}: {problem}") from None
        if action.stage is None:
            raise ValueError(f"{path}: rank {rank}: {text} is not an LLM action; a backbone has F, B, I and W only")
        if action.kind == "F":
            expected = forwards.get(action.stage, 0)
            if action.index != expected:
                raise ValueError(
                    f"{path}: rank {rank}: found {text}, expected {action.stage}F{expected}, as a stage must "
                    "forward the microbatches in their order"
                )
            forwards[action.stage] = expected + 1
        actions.append(action)
    return actions


def _stage_rank(path: str, orders: Orders) -> list[int]:
    """Return the rank of each stage.

    Raises:
        ValueError: a stage has actions on two ranks, or the stages are not numbered 0, 1, 2 ...
    """
    owner: dict[int, int] = {}
    for rank, actions in enumerate(orders):
        for action in actions:
            assert action.stage is not None
            if owner.setdefault(action.stage, rank) != rank:
                raise ValueError(f"{path}: stage {action.stage} is on ranks {owner[action.stage]} and {rank}")
    if sorted(owner) != list(range(len(owner))):
        raise ValueError(f"{path} has the stages {sorted(owner)}; expected 0 .. {len(owner) - 1}")
    return [owner[stage] for stage in range(len(owner))]
