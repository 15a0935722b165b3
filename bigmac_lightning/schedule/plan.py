"""A plan: every rank's actions in order, with the costs they were planned for; and the plan file format.

``make`` makes plans, ``verify`` checks them, and ``runtime.lowering`` turns them into programs.
"""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from typing import Any

from bigmac_lightning.schedule.action import Action, Kind
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.reading import Reader, is_amount, is_integer, read_text

__all__ = ["FORMAT", "Costs", "Plan", "PlanError"]

FORMAT = "bigmac-plan/1"
"""The name and version of the plan file format, which every plan file contains."""


class PlanError(ValueError):
    """Raised for a plan that is malformed or incomplete, that would deadlock, or that exceeds a limit."""


@dataclass
class Plan:
    """The actions of all ranks, and the shapes and costs that they were planned for.

    Attributes:
        policy: name of the policy that placed the encoder and generator work.
        backbone: name of the LLM-only schedule.
        pipeline_parallel_size: number of ranks, P.
        virtual_stages: number of stages per rank, V.
        microbatches: number of microbatches, M.
        stage_rank: rank of each stage, P * V entries (fewer if some ranks have only encoder or generator work).
        groups: microbatches of each group.
        encoder_shares: per group, each rank's fraction of the group's encoder work. A row has P entries and sums to 1,
            or is all 0 if the group has no such work. Empty if there is no encoder.
        generator_shares: per group, each rank's fraction of the group's generator work, in the same form.
        ranks: per rank, its actions in order.
        costs: times of the actions.
        stage_costs: per stage, its times of F, B, I and W, where stages differ; empty if all stages take the times in
            `costs`. A kind whose time is 0 does not occur on that stage: B, I and W on stages that no gradient passes,
            W on frozen stages.
        meeting: the kinds of actions (EF, EB, G) inside which all ranks wait for each other, because the weights lie in
            shards on all of them: the ranks' actions of a group start when the last of the ranks can start, and end
            together.
        makespan: simulated time of the whole plan, in the unit of `costs`.
        ideal: simulated time of the bare backbone plus the nested work's time divided by P, in the same unit.
        peak: for the keys "encoder_units" and "llm_microbatches", the largest number alive at any time on each rank.
    """

    policy: str
    backbone: str
    pipeline_parallel_size: int
    virtual_stages: int
    microbatches: int
    stage_rank: list[int]
    groups: list[list[int]]
    encoder_shares: list[list[float]]
    generator_shares: list[list[float]]
    ranks: list[list[Action]]
    costs: Costs = field(default_factory=Costs)
    makespan: float = 0.0
    ideal: float = 0.0
    peak: dict[str, list[float]] = field(default_factory=lambda: {"encoder_units": [], "llm_microbatches": []})
    stage_costs: list[list[float]] = field(default_factory=list)
    meeting: list[Kind] = field(default_factory=list)

    @property
    def stages(self) -> int:
        """Number of stages: P * V, or less if some ranks have only encoder or generator work."""
        return len(self.stage_rank)

    def cost(self, kind: Kind, stage: int) -> float:
        """Time of one F, B, I or W action of a stage on a mean microbatch."""
        if self.stage_costs:
            return self.stage_costs[stage]["FBIW".index(kind)]
        return {"F": self.costs.F, "B": self.costs.B, "I": self.costs.I, "W": self.costs.W}[kind]

    def occurs(self, action: Action) -> bool:
        """Whether the costs allow this action, that is, its kind and its stage's time are not 0."""
        kinds = self.costs.kinds
        return action.kind in kinds and (action.stage is None or self.cost(action.kind, action.stage) > 0)

    def pieces(self, kind: str) -> dict[tuple[int, int], int]:
        """By (group, rank), the number of pieces that the rank's EF, EB or G share of the group is cut into."""
        return {(a.index, rank): a.pieces for rank, row in enumerate(self.ranks) for a in row if a.kind == kind}

    @property
    def recomputes(self) -> bool:
        """Whether EF saves no activations, so that EB starts with running the encoder's forward again."""
        return self.policy == "recompute"

    def without(self, unneeded: Collection[tuple[Kind, int]]) -> "Plan":
        """A copy without all ranks' actions of these kinds and groups, such as ("EF", 0)."""
        ranks = [[action for action in row if (action.kind, action.index) not in unneeded] for row in self.ranks]
        return replace(self, ranks=ranks)

    def shares(self, kind: str) -> list[list[float]]:
        """The shares of the work of this kind, EF, EB or G: per group, one per rank."""
        return self.generator_shares if kind == "G" else self.encoder_shares

    def to_json(self) -> str:
        """Return the text of the plan file. Each row of a table is on one line."""
        values = {"format": FORMAT} | {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["ranks"] = [[str(action) for action in actions] for actions in self.ranks]
        values["costs"] = asdict(self.costs)
        for name in ("stage_costs", "meeting"):
            if not values[name]:
                del values[name]
        return "{\n" + ",\n".join(f' "{key}": {_value_text(value)}' for key, value in values.items()) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> "Plan":
        """Return the plan of a plan file's text. It is not verified: see ``verify``.

        Args:
            text: text in the form that ``to_json`` returns.
            source: name of the text, for errors.

        Raises:
            PlanError: the text is not JSON, or a key is missing, unknown or has a wrong value; names source and key.
        """
        reader = Reader.of_format(text, source, PlanError, FORMAT, {entry.name for entry in fields(cls)})
        stage_costs: list[list[float]] = []
        if "stage_costs" in reader.data:
            stage_costs = reader.rows("stage_costs", "a list with the times of F, B, I, W per stage", is_amount)
        meeting: list[Any] = []
        if "meeting" in reader.data:
            meeting = reader.items("meeting", "a list of EF, EB and G", ("EF", "EB", "G").__contains__)
        shares = "a list with a list of numbers of at least 0 per group"
        return cls(
            policy=reader.text("policy"),
            backbone=reader.text("backbone"),
            pipeline_parallel_size=reader.integer("pipeline_parallel_size", 1),
            virtual_stages=reader.integer("virtual_stages", 1),
            microbatches=reader.integer("microbatches", 1),
            stage_rank=reader.items("stage_rank", "a list with the rank of each stage", is_integer),
            groups=reader.rows("groups", "a list with a list of microbatches per group", is_integer),
            encoder_shares=reader.rows("encoder_shares", shares, is_amount),
            generator_shares=reader.rows("generator_shares", shares, is_amount),
            ranks=_read_ranks(reader),
            costs=_read_costs(reader),
            makespan=reader.number("makespan"),
            ideal=reader.number("ideal"),
            peak=_read_peak(reader),
            stage_costs=stage_costs,
            meeting=meeting,
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write a plan file."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.to_json())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Plan":
        """Read a plan file. It is not verified: see ``verify``.

        Raises:
            PlanError: the file cannot be read, or ``from_json`` refuses its text.
        """
        return cls.from_json(read_text(str(path), PlanError), str(path))


def _value_text(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
    return json.dumps(value)


def _read_ranks(reader: Reader) -> list[list[Action]]:
    texts = reader.rows("ranks", "a list with a list of action texts per rank", lambda text: isinstance(text, str))
    ranks: list[list[Action]] = []
    for rank, row in enumerate(texts):
        actions: list[Action] = []
        for position, text in enumerate(row):
            try:
                actions.append(Action.parse(text))
            except ValueError as problem:
                raise PlanError(f"{reader.source}: ranks[{rank}][{position}]: {problem}") from None
        ranks.append(actions)
    return ranks


def _read_costs(reader: Reader) -> Costs:
    costs = Reader(reader.get("costs", "an object"), f"{reader.source}: costs", PlanError)
    names = [entry.name for entry in fields(Costs)]
    costs.only(set(names))
    try:
        return Costs(**{name: costs.number(name) for name in names})
    except ValueError as problem:
        raise problem if isinstance(problem, PlanError) else PlanError(f"{reader.source}: {problem}") from None


def _read_peak(reader: Reader) -> dict[str, list[float]]:
    peak = Reader(reader.get("peak", "an object"), f"{reader.source}: peak", PlanError)
    keys = ("encoder_units", "llm_microbatches")
    peak.only(set(keys))
    return {key: peak.items(key, "a list with a number of at least 0 per rank", is_amount) for key in keys}
