"""From a verified plan to programs: each rank's computations with the sends and receives between them.

One pass over one total order of all actions. Where an action produces something for another rank, its send and the
matching receive are emitted at that same moment, so all messages of a step stand in one total order that every rank's
program follows: no two ranks can wait for each other, not even if every send blocked until it is received.

Knows plans; knows no tensors and no process groups.
"""

from dataclasses import dataclass
from typing import Literal

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.plan import Plan

MessageKind = Literal["hidden", "hidden_grad", "features", "features_grad", "conditions", "conditions_grad"]
MESSAGE_KINDS: tuple[MessageKind, ...] = (
    "hidden",
    "hidden_grad",
    "features",
    "features_grad",
    "conditions",
    "conditions_grad",
)


@dataclass(frozen=True, slots=True)
class Message:
    """Names one tensor that an action produces for another action.

    Attributes:
        kind: ``hidden``/``hidden_grad``: a microbatch's hidden states between stages and their gradient;
            ``features``/``features_grad``: encoder features of a piece of a rank's share of a group, their gradient;
            ``conditions``/``conditions_grad``: generator conditions of such a piece and their gradient.
        index: microbatch (hidden) or group (features, conditions).
        place: the stage that consumes the hidden states or produced them; the rank that owns the share.
        piece: which piece of the share.
    """

    kind: MessageKind
    index: int
    place: int
    piece: int = 0


@dataclass(frozen=True, slots=True)
class Compute:
    """An action, and what it must put out: for other ranks (sent by the next instructions) or for this one."""

    action: Action
    produces: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Send:
    message: Message
    peer: int


@dataclass(frozen=True, slots=True)
class Receive:
    message: Message
    peer: int


Instruction = Compute | Send | Receive


@dataclass(frozen=True)
class Needs:
    """Where gradients are needed in a step, so that no useless backward runs and no useless gradient travels.

    Attributes:
        weights: per stage, whether it has trained weights.
        encoded: per microbatch, whether it has features of a trained encoder.
        generator: whether any generator is trained.
    """

    weights: tuple[bool, ...]
    encoded: tuple[bool, ...]
    generator: bool

    @classmethod
    def nothing(cls, stages: int, microbatches: int) -> "Needs":
        return cls((False,) * stages, (False,) * microbatches, generator=False)

    @property
    def encoder(self) -> bool:
        """Whether any encoder has something to learn from the step."""
        return any(self.encoded)

    def through(self, stage: int, microbatch: int) -> bool:
        """Whether a microbatch's gradients flow through a stage: it or an earlier one is trained, or an encoder whose
        features the microbatch has."""
        return self.encoded[microbatch] or any(self.weights[: stage + 1])


def lower(plan: Plan, order: list[tuple[int, int]], needs: Needs) -> list[list[Instruction]]:
    """The program of every rank.

    Args:
        plan: a verified plan.
        order: (rank, position) of all actions in one total order that respects every dependency (`Timeline.order`).
        needs: where gradients flow.
    """
    programs: list[list[Instruction]] = [[] for _ in plan.ranks]
    routes = _Routes(plan, needs)
    for rank, position in order:
        action = plan.ranks[rank][position]
        produced = routes.produced(rank, action)
        programs[rank].append(Compute(action, tuple(message for message, _ in produced)))
        for message, receiver in produced:
            if receiver != rank:
                programs[rank].append(Send(message, receiver))
                programs[receiver].append(Receive(message, rank))
    return programs


class _Routes:
    """Who gets what each action produces."""

    def __init__(self, plan: Plan, needs: Needs) -> None:
        self.plan, self.needs = plan, needs
        self.last = len(plan.stage_rank) - 1
        self.group_of = {m: g for g, group in enumerate(plan.groups) for m in group}
        self.pieces_of: dict[tuple[str, int], list[tuple[int, int]]] = {}  # (rank, piece)
        for rank, actions in enumerate(plan.ranks):
            for action in actions:
                if action.nested:
                    self.pieces_of.setdefault((action.kind, action.index), []).append((rank, action.piece))
        # stage 0's backwards and the last stage's forwards still to come per group: the last one sends for the group
        self.backwards_left = [len(group) for group in plan.groups]
        self.forwards_left = [len(group) for group in plan.groups]

    def produced(self, rank: int, action: Action) -> list[tuple[Message, int]]:
        stage_rank, index, stage = self.plan.stage_rank, action.index, action.stage
        if action.kind == "EF":
            return [(Message("features", index, rank, action.piece), stage_rank[0])]
        if action.kind == "G":
            needed = any(self.needs.through(self.last, m) for m in self.plan.groups[index])
            return [(Message("conditions_grad", index, rank, action.piece), stage_rank[-1])] if needed else []
        if action.kind == "F" and stage is not None:
            if stage < self.last:
                return [(Message("hidden", index, stage + 1), stage_rank[stage + 1])]
            return self._for_group(self.forwards_left, "G", "conditions", index)
        if action.kind in ("B", "I") and stage is not None:
            if stage > 0:
                needed = self.needs.through(stage - 1, index)
                return [(Message("hidden_grad", index, stage - 1), stage_rank[stage - 1])] if needed else []
            return self._for_group(self.backwards_left, "EB", "features_grad", index)
        return []

    def _for_group(
        self, left: list[int], kind: str, message: MessageKind, microbatch: int
    ) -> list[tuple[Message, int]]:
        group = self.group_of[microbatch]
        left[group] -= 1
        if left[group]:
            return []
        pieces = self.pieces_of.get((kind, group), [])
        return [(Message(message, group, rank, piece), rank) for rank, piece in pieces]
