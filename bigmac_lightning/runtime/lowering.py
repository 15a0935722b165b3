"""Lowers a verified plan to programs: each rank's computations with the sends and receives between them.

One pass runs over one total order of all actions. Right after an action that produces a tensor for another rank, the
send is appended to the one program and the matching receive to the other. So all messages of a step have one total
order, which every rank's program follows, and no two ranks can wait for each other, even if each send blocks until it
is received (``verify`` has the argument). A receive instruction does not block; the action that uses the tensor waits
for it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
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
    """The name of a tensor that one action produces for another one.

    Attributes:
        kind: ``hidden`` and ``hidden_grad``: a microbatch's hidden states between two stages, and their gradient;
            ``features`` and ``features_grad``: the encoder features of a piece of a rank's share of a group, and their
            gradient; ``conditions`` and ``conditions_grad``: the hidden states that condition the generator for such a
            piece, and their gradient.
        index: the microbatch for ``hidden`` and ``hidden_grad``, the group for the other kinds.
        place: the stage that uses the tensor for ``hidden`` and ``hidden_grad``, the rank that has the share for the
            other kinds.
        piece: the number of the piece of the share.
    """

    kind: MessageKind
    index: int
    place: int
    piece: int = 0


@dataclass(frozen=True, slots=True)
class Compute:
    """Execute an action.

    Attributes:
        action: the action.
        produces: the tensors that it must produce, for other ranks (the next instructions send them) or for this rank.
    """

    action: Action
    produces: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Send:
    """Start to send a tensor to the pipeline rank `peer`."""

    message: Message
    peer: int


@dataclass(frozen=True, slots=True)
class Receive:
    """Start to receive a tensor from the pipeline rank `peer`."""

    message: Message
    peer: int


@dataclass(frozen=True, slots=True)
class Done:
    """This rank has computed all its gradients of "generators", of the "llm", or of "encoders": sums may start."""

    part: str


@dataclass(frozen=True, slots=True)
class Soon:
    """The nested action after the next one of the LLM gathers weights: it may start to."""

    action: Action


Hint = Done | Soon
Instruction = Compute | Send | Receive | Hint

LAST_OF = {"generators": ("G",), "llm": ("B", "I", "W"), "encoders": ("EB",)}
"""The kinds of actions that compute gradients of each part of a model."""


@dataclass(frozen=True)
class Needs:
    """The parts of a step that need gradients. Elsewhere, no backward runs and no gradient is sent.

    Attributes:
        weights: per stage, whether it has trainable weights.
        encoded: per microbatch, whether it has features of a trainable encoder.
        generator: whether a generator is trainable.
    """

    weights: tuple[bool, ...]
    encoded: tuple[bool, ...]
    generator: bool

    @classmethod
    def nothing(cls, stages: int, microbatches: int) -> "Needs":
        """Return the needs of a step without gradients, such as an evaluation."""
        return cls((False,) * stages, (False,) * microbatches, generator=False)

    @property
    def encoder(self) -> bool:
        """Whether a trainable encoder has items in the step."""
        return any(self.encoded)

    def through(self, stage: int, microbatch: int) -> bool:
        """Whether the backward of a microbatch must pass through a stage, because this stage, an earlier one, or an
        encoder of the microbatch's features is trainable."""
        return self.encoded[microbatch] or any(self.weights[: stage + 1])


def lower(plan: Plan, order: list[tuple[int, int]], needs: Needs) -> list[list[Instruction]]:
    """Return the program of every rank, without hints.

    Args:
        plan: a verified plan.
        order: all actions as (rank, position in its list), in a total order that respects every dependency and every
            rank's list, such as ``Timeline.order``.
        needs: the parts of the step that need gradients.
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


def with_hints(program: list[Instruction], meeting: Collection[str]) -> list[Instruction]:
    """A program that says when it is done with a part of the model: after the last action, and what it sends; and
    before an LLM action that a nested action follows, if that gathers weights.

    Args:
        meeting: the kinds of actions inside which all ranks gather weights.
    """
    hints: dict[int, list[Hint]] = {}
    computes = [(i, one.action) for i, one in enumerate(program) if isinstance(one, Compute)]
    for (i, action), (_, following) in pairwise(computes):
        if following.kind in meeting and not action.nested:
            hints.setdefault(i, []).append(Soon(following))
    done: list[Hint] = []
    for part, kinds in LAST_OF.items():
        own = [i for i, action in computes if action.kind in kinds]
        done.append(Done(part))
        if own:  # with the parts before it that this rank has no action of
            end = own[-1] + 1
            while end < len(program) and isinstance(program[end], Send):
                end += 1
            hints.setdefault(end, []).extend(done)
            done = []
    return [one for i in range(len(program) + 1) for one in (*hints.get(i, ()), *program[i : i + 1])]


class _Routes:
    """The messages of each action, and the ranks that receive them. Actions must be passed in a total order."""

    def __init__(self, plan: Plan, needs: Needs) -> None:
        self.plan, self.needs = plan, needs
        self.last = len(plan.stage_rank) - 1
        self.group_of = {m: g for g, group in enumerate(plan.groups) for m in group}
        self.pieces_of: dict[tuple[str, int], list[tuple[int, int]]] = {}  # (rank, piece)
        for rank, actions in enumerate(plan.ranks):
            for action in actions:
                if action.nested:
                    self.pieces_of.setdefault((action.kind, action.index), []).append((rank, action.piece))
        # Per group, the numbers of stage 0's backwards and of the last stage's forwards that are still to come. The
        # last one of a group sends the group's gradients or conditions.
        self.backwards_left = [len(group) for group in plan.groups]
        self.forwards_left = [len(group) for group in plan.groups]

    def produced(self, rank: int, action: Action) -> list[tuple[Message, int]]:
        """Return the messages that an action produces, each with the rank that receives it."""
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
        """Count one of a group's microbatches; after the last one, return the messages for all pieces of the group."""
        group = self.group_of[microbatch]
        left[group] -= 1
        if left[group]:
            return []
        pieces = self.pieces_of.get((kind, group), [])
        return [(Message(message, group, rank, piece), rank) for rank, piece in pieces]
