"""The dependencies between actions: for each action, the actions that must end before it can start.

Simulation, verification, bounds and the filling pass all take the dependencies from here. The rules for microbatch m of
group g, with stages 0 .. L, are:

=========  ====================================================================================================
action     needs
=========  ====================================================================================================
0F m       EF g of every rank that has it, all pieces
sF m       (s-1)F m
LB m       LF m, and G g of every rank that has it, all pieces
sB m       sF m and (s+1)B m
sI m       as sB m; in both the next stage's backward may be a B or an I
sW m       sI m
EF g       nothing
EB g       the same piece of EF g on its own rank, and stage 0's B or I on all microbatches of g
G g        LF on all microbatches of g
=========  ====================================================================================================
"""

from collections.abc import Sequence

from bigmac_lightning.schedule.plan import Plan, PlanError


class Dataflow:
    """The dependencies of a plan's actions. Actions are numbered rank by rank, in the order of each rank's list.

    Attributes:
        actions: all actions.
        ranks: the rank of each action.
        first: per rank, the number of its first action; a last entry holds the number of all actions.
        needs: per action, the numbers of the actions that must end before it starts. The order of a rank's list is not
            a dependency.

    Raises:
        PlanError: an action that another one needs is in no list.
    """

    def __init__(self, plan: Plan) -> None:
        self.actions = [action for actions in plan.ranks for action in actions]
        self.ranks = [rank for rank, actions in enumerate(plan.ranks) for _ in actions]
        self.first = [0]
        for actions in plan.ranks:
            self.first.append(self.first[-1] + len(actions))
        self._groups = plan.groups
        self._group_of = {microbatch: g for g, group in enumerate(plan.groups) for microbatch in group}
        self._last = plan.stages - 1
        self._llm: dict[tuple[str, int, int], int] = {}
        self._encoded: dict[tuple[int, int, int, int], int] = {}
        self._nested: dict[tuple[str, int], list[int]] = {}
        for number, action in enumerate(self.actions):
            if action.stage is not None:
                self._llm[action.kind, action.stage, action.index] = number
                continue
            self._nested.setdefault((action.kind, action.index), []).append(number)
            if action.kind == "EF":
                self._encoded[self.ranks[number], action.index, action.piece, action.pieces] = number
        self.needs = [self._needs_of(number) for number in range(len(self.actions))]

    def position(self, number: int) -> tuple[int, int]:
        """Return (rank, position in the rank's list) of the action with this number."""
        rank = self.ranks[number]
        return rank, number - self.first[rank]

    def between_ranks(self, order: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Pairs of numbers, of an action on one rank and of the first action on another rank that needs its result.

        Where an action needs several of another rank, such as all forwards of a group, the last of them counts.

        Args:
            order: all actions as (rank, position in its list), in order of time.
        """
        turn = {self.first[rank] + position: i for i, (rank, position) in enumerate(order)}
        found: dict[tuple[int, int], int] = {}
        for number in sorted(turn, key=turn.__getitem__):
            last: dict[int, int] = {}
            for need in self.needs[number]:
                rank = self.ranks[need]
                if rank != self.ranks[number] and turn[need] >= turn.get(last.get(rank, -1), -1):
                    last[rank] = need
            for need in last.values():
                found.setdefault((need, self.ranks[number]), number)
        return [(need, number) for (need, _), number in found.items()]

    def _needs_of(self, number: int) -> list[int]:
        action = self.actions[number]
        kind, index, stage = action.kind, action.index, action.stage
        if kind == "EF":
            return []
        if kind == "EB":
            encoded = self._encoded.get((self.ranks[number], index, action.piece, action.pieces))
            if encoded is None:
                raise self._missing(number, f"EF{str(action)[2:]} on its own rank")
            return [encoded, *(self._backward(number, 0, microbatch) for microbatch in self._group(number, index))]
        if kind == "G":
            return [self._forward(number, self._last, microbatch) for microbatch in self._group(number, index)]
        assert stage is not None
        if kind == "F":
            if stage > 0:
                return [self._forward(number, stage - 1, index)]
            return self._nested.get(("EF", self._group_of.get(index, -1)), [])
        if kind == "W":
            half = self._llm.get(("I", stage, index))
            if half is None:
                raise self._missing(number, f"{stage}I{index}")
            return [half]
        own = self._forward(number, stage, index)
        if stage < self._last:
            return [own, self._backward(number, stage + 1, index)]
        return [own, *self._nested.get(("G", self._group_of.get(index, -1)), [])]

    def _forward(self, number: int, stage: int, microbatch: int) -> int:
        found = self._llm.get(("F", stage, microbatch))
        if found is None:
            raise self._missing(number, f"{stage}F{microbatch}")
        return found

    def _backward(self, number: int, stage: int, microbatch: int) -> int:
        found = self._llm.get(("B", stage, microbatch), self._llm.get(("I", stage, microbatch)))
        if found is None:
            raise self._missing(number, f"{stage}B{microbatch}")
        return found

    def _group(self, number: int, index: int) -> list[int]:
        if index >= len(self._groups):
            raise self._missing(number, f"group {index}")
        return self._groups[index]

    def _missing(self, number: int, text: str) -> PlanError:
        return PlanError(f"rank {self.ranks[number]}: {self.actions[number]} needs {text}, which is not in the plan")
