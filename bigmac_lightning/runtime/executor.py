"""Runs one rank's program: computes the actions, keeps the autograd graphs between forward and backward, and hands
tensors to the transport.

Everything that a model does comes in through `Computation`; the executor itself handles stages, microbatches, groups
and gradients. It keeps each tensor from the action that makes it to the last action that needs it, and no longer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.autograd.graph import GradientEdge, get_gradient_edge

from bigmac_lightning.runtime import split_backward
from bigmac_lightning.runtime.lowering import Compute, Instruction, Message, MessageKind, Needs, Receive, Send
from bigmac_lightning.runtime.measure.memory import MemoryTracker
from bigmac_lightning.runtime.measure.trace import Trace
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.runtime.randomness import RandomState
from bigmac_lightning.runtime.routing import Place, Routing
from bigmac_lightning.runtime.transport import Transport
from bigmac_lightning.schedule.action import Action


@dataclass
class Outcome:
    """What a stage makes of a microbatch.

    Attributes:
        hidden: hidden states for the next stage; ``None`` after the last.
        loss: scaled scalar to run backward from (last stage); ``None`` if the microbatch has none.
        conditions: rows for the generators (last stage); ``None`` if the microbatch has no targets.
    """

    hidden: Tensor | None = None
    loss: Tensor | None = None
    conditions: Tensor | None = None


class Computation(Protocol):
    """A model and one batch, as the executor sees them.

    Attributes:
        width, dtype: of hidden states, features and conditions.
        features, conditions: whose rows are whose.
    """

    width: int
    dtype: torch.dtype
    features: Routing
    conditions: Routing

    def hidden_shape(self, microbatch: int, stage: int) -> tuple[int, ...]:
        """Shape of what a stage > 0 gets for a microbatch (hidden states and all), known before anything runs."""
        ...

    def encode(self, group: int, piece: int) -> Tensor:
        """The rows of a piece, which has items, of this rank's share of a group."""
        ...

    def forward(self, stage: int, microbatch: int, hidden: Tensor | None, features: Tensor | None) -> Outcome:
        """One stage on one microbatch."""
        ...

    def generate(self, group: int, piece: int, conditions: Tensor) -> Tensor | None:
        """The scaled loss of a piece, which has items; ``None`` where there is nothing to learn from."""
        ...


@dataclass
class _Graph:
    """Kept from a stage's forward on a microbatch to its backward: the leaves it starts from, and where it ends. No
    output is kept: whoever needs its memory, to save it for the backward, holds it."""

    hidden: Tensor | None
    features: Tensor | None
    outputs: dict[str, GradientEdge]

    @property
    def inputs(self) -> list[Tensor]:
        """The leaves that need gradients."""
        return [x for x in (self.hidden, self.features) if x is not None and x.requires_grad]


class Executor:
    """Runs programs on one rank.

    Args:
        mesh: the process groups.
        stage_rank: pipeline rank of each stage.
        memory: counts activation bytes per component; ``None``: no counting.
        trace: records when each action ran; ``None``: no record.
    """

    def __init__(
        self,
        mesh: PipelineMesh,
        stage_rank: Sequence[int],
        memory: MemoryTracker | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.mesh, self.stage_rank = mesh, tuple(stage_rank)
        self.memory, self.trace = memory, trace
        self.splits: split_backward.Splits = {}

    def run(
        self, program: Sequence[Instruction], computation: Computation, needs: Needs, recompute: bool = False
    ) -> None:
        """Run one step. Gradients are added to the parameters' ``.grad``.

        Args:
            recompute: encoder forwards keep nothing, and encoder backwards do them once more.

        Any error names the rank and the action it happened in.
        """
        step = _Step(self, computation, needs, recompute)
        for instruction in program:
            try:
                step.run(instruction)
            except Exception as error:
                where = instruction.action if isinstance(instruction, Compute) else instruction
                error.add_note(f"in {where} on pipeline rank {self.mesh.pp_rank} of {self.mesh.pp_size}")
                raise
        step.finish()


class _Step:
    """The state of one run of one program."""

    def __init__(self, executor: Executor, computation: Computation, needs: Needs, recompute: bool) -> None:
        self.executor, self.computation, self.needs, self.recompute = executor, computation, needs, recompute
        self.rank = executor.mesh.pp_rank
        self.last = len(executor.stage_rank) - 1
        self.transport = Transport(executor.mesh)
        self.graphs: dict[tuple[int, int], _Graph] = {}
        self.deferred: dict[tuple[int, int], split_backward.Deferred] = {}
        self.encoded: dict[tuple[int, int], GradientEdge | RandomState | None] = {}  # by group and piece
        self.arriving: dict[tuple[str, int], _Pieces] = {}  # features and conditions_grad, by group
        self.leaving: dict[tuple[str, int], _Rows] = {}  # conditions and features_grad, by group
        self.handlers: dict[str, Callable[[Action], Mapping[str, Tensor]]] = {
            "EF": self.encode,
            "EB": self.encode_backward,
            "F": self.forward,
            "B": self.backward,
            "I": self.backward_input,
            "W": self.backward_weight,
            "G": self.generate,
        }

    def run(self, instruction: Instruction) -> None:
        if isinstance(instruction, Send):
            self.transport.send(instruction.message, instruction.peer)
        elif isinstance(instruction, Receive):
            shape = self.shape(instruction.message)
            self.transport.receive(instruction.message, instruction.peer, shape, self.computation.dtype)
        else:
            results = self.handlers[instruction.action.kind](instruction.action)
            for message in instruction.produces:
                self.transport.put(message, self.content(message, results))

    def finish(self) -> None:
        self.transport.finish()
        kept = [*self.graphs, *self.deferred, *self.encoded, *self.arriving, *self.leaving]
        assert not kept, f"still held at the end of the step: {kept}"

    def shape(self, message: Message) -> tuple[int, ...]:
        if message.kind == "hidden":
            return self.computation.hidden_shape(message.index, message.place)
        if message.kind == "hidden_grad":
            return self.computation.hidden_shape(message.index, message.place + 1)
        routing = self.computation.features if message.kind.startswith("features") else self.computation.conditions
        return (routing.rows(message.index, (message.place, message.piece)), self.computation.width)

    def content(self, message: Message, results: Mapping[str, Tensor]) -> Tensor:
        """The tensor of a message, after the action that produces it."""
        if message.kind in ("features_grad", "conditions"):  # the group's last microbatch is done: cut into pieces
            routing = self.computation.features if message.kind == "features_grad" else self.computation.conditions
            rows = self.leaving[message.kind, message.index]
            piece = routing.scatter(message.index, (message.place, message.piece), rows.of_microbatch)
            rows.pieces_left -= 1
            if not rows.pieces_left:
                del self.leaving[message.kind, message.index]
            return piece
        return results[message.kind]

    @contextmanager
    def computing(self, action: Action, component: str, grad: bool) -> Iterator[None]:
        """Around the model's own work on an action: gradients on or off, bytes counted, time recorded."""
        memory, trace = self.executor.memory, self.executor.trace
        counted: AbstractContextManager[None] = memory.component(component) if memory is not None else nullcontext()
        recorded = trace.action(action) if trace is not None else nullcontext()
        named = torch.profiler.record_function(str(action)) if profiler._is_profiler_enabled else nullcontext()
        with torch.set_grad_enabled(grad), recorded, counted, named:
            yield

    # -- encoder ---------------------------------------------------------------------------------------------------

    def encode(self, action: Action) -> Mapping[str, Tensor]:
        state = RandomState(self.executor.mesh.device) if self.recompute else None
        with self.computing(action, "encoder", self.needs.encoder and not self.recompute):
            rows = self._encode(action)
        if self.needs.encoder:
            self.encoded[action.index, action.piece] = _edge(rows) if state is None else state
        return {"features": rows.detach()}

    def encode_backward(self, action: Action) -> Mapping[str, Tensor]:
        gradient = self.transport.take(Message("features_grad", action.index, self.rank, action.piece))
        output = self.encoded.pop((action.index, action.piece))
        with self.computing(action, "encoder", grad=True):
            if isinstance(output, RandomState):
                with output.restored():
                    output = _edge(self._encode(action))
            if output is not None:  # a piece may hold only items of a frozen encoder, or none
                split_backward.backward([output], [gradient])
        return {}

    def _encode(self, action: Action) -> Tensor:
        if not self.computation.features.items(action.index, (self.rank, action.piece)):
            return self._zeros(0)
        return self.computation.encode(action.index, action.piece).to(self.computation.dtype)

    # -- LLM ---------------------------------------------------------------------------------------------------------

    def forward(self, action: Action) -> Mapping[str, Tensor]:
        stage, microbatch = _stage(action), action.index
        grad = self.needs.through(stage, microbatch)
        hidden = features = None
        if stage > 0:
            hidden = self.transport.take(Message("hidden", microbatch, stage))
            hidden.requires_grad_(self.needs.through(stage - 1, microbatch))
        elif self.computation.features.has_items(microbatch):
            features = self._gather("features", self.computation.features, microbatch)
            features.requires_grad_(self.needs.encoded[microbatch])
        with self.computing(action, "llm", grad):
            outcome = self.computation.forward(stage, microbatch, hidden, features)
        if grad:
            outputs = {"hidden": outcome.hidden, "loss": outcome.loss, "conditions": outcome.conditions}
            edges = {name: _edge(output) for name, output in outputs.items() if output is not None}
            ends = {name: edge for name, edge in edges.items() if edge is not None}
            self.graphs[stage, microbatch] = _Graph(hidden, features, ends)
        if outcome.conditions is not None:
            self._collect("conditions", self.computation.conditions, microbatch, outcome.conditions.detach())
        return {} if outcome.hidden is None else {"hidden": outcome.hidden.detach()}

    def backward(self, action: Action) -> Mapping[str, Tensor]:
        graph, edges, gradients = self._start(action)
        with self.computing(action, "llm", grad=True):
            split_backward.backward(edges, gradients)
        return self._input_gradients(action, graph)

    def backward_input(self, action: Action) -> Mapping[str, Tensor]:
        graph, edges, gradients = self._start(action)
        inputs = [] if graph is None else graph.inputs
        stage, splits = _stage(action), self.executor.splits
        with self.computing(action, "llm", grad=True):
            deferred = split_backward.backward_input(edges, gradients, inputs, splits, stage)
        if deferred is not None:
            self.deferred[stage, action.index] = deferred
        return self._input_gradients(action, graph)

    def backward_weight(self, action: Action) -> Mapping[str, Tensor]:
        deferred = self.deferred.pop((_stage(action), action.index), None)
        with self.computing(action, "llm", grad=True):
            if deferred is not None:
                split_backward.backward_weight(deferred)
        return {}

    def _start(self, action: Action) -> tuple[_Graph | None, list[GradientEdge], list[Tensor | None]]:
        """Where the backward of a stage on a microbatch starts, and the gradients there. What comes for an output that
        nothing trained has led to is dropped."""
        stage, microbatch = _stage(action), action.index
        graph = self.graphs.pop((stage, microbatch), None)
        arrived: dict[str, Tensor | None] = {"loss": None}
        if graph is not None and stage < self.last:
            arrived["hidden"] = self.transport.take(Message("hidden_grad", microbatch, stage))
        if (
            stage == self.last
            and self.computation.conditions.has_items(microbatch)
            and self._are_conditions_learnt(microbatch)
        ):
            arrived["conditions"] = self._gather("conditions_grad", self.computation.conditions, microbatch)
        outputs = {} if graph is None else graph.outputs
        return graph, list(outputs.values()), [arrived[name] for name in outputs]

    def _input_gradients(self, action: Action, graph: _Graph | None) -> Mapping[str, Tensor]:
        """What a backward gives to the stage before, or to the encoders."""
        stage, microbatch = _stage(action), action.index
        if stage == 0 and self.needs.encoder and self.computation.features.has_items(microbatch):
            features = None if graph is None else graph.features
            rows = self.computation.features.rows_of(microbatch)
            given = self._zeros(rows) if features is None else _gradient(features)
            self._collect("features_grad", self.computation.features, microbatch, given)
        if graph is not None and graph.hidden is not None and graph.hidden.requires_grad:
            return {"hidden_grad": _gradient(graph.hidden)}
        return {}

    def _are_conditions_learnt(self, microbatch: int) -> bool:
        """Whether gradients come back from the generators for the microbatch's group."""
        group = self.computation.conditions.groups[self.computation.conditions.group_of[microbatch]]
        return any(self.needs.through(self.last, m) for m in group)

    def _zeros(self, rows: int) -> Tensor:
        """Rows of features that nothing is computed for, or their gradient if nothing is learnt from them."""
        return torch.zeros(rows, self.computation.width, dtype=self.computation.dtype, device=self.executor.mesh.device)

    # -- generator -------------------------------------------------------------------------------------------------

    def generate(self, action: Action) -> Mapping[str, Tensor]:
        conditions = self.transport.take(Message("conditions", action.index, self.rank, action.piece))
        back = any(self.needs.through(self.last, m) for m in self.computation.conditions.groups[action.index])
        conditions.requires_grad_(back)
        with self.computing(action, "generator", back or self.needs.generator):
            has_items = self.computation.conditions.items(action.index, (self.rank, action.piece))
            loss = self.computation.generate(action.index, action.piece, conditions) if has_items else None
            if loss is not None and loss.requires_grad:
                loss.backward()
        return {"conditions_grad": _gradient(conditions)} if back else {}

    # -- pieces ------------------------------------------------------------------------------------------------------

    def _gather(self, kind: MessageKind, routing: Routing, microbatch: int) -> Tensor:
        """A microbatch's rows of what the ranks sent for its group; waits for all of the group's pieces."""
        group = routing.group_of[microbatch]
        pieces = self.arriving.get((kind, group))
        if pieces is None:
            buffers = {place: self.transport.take(Message(kind, group, *place)) for place in routing.places(group)}
            pieces = self.arriving[kind, group] = _Pieces(buffers, sum(map(routing.has_items, routing.groups[group])))
        pieces.microbatches_left -= 1
        if not pieces.microbatches_left:
            del self.arriving[kind, group]
        return routing.gather(microbatch, pieces.of_place)

    def _collect(self, kind: MessageKind, routing: Routing, microbatch: int, rows: Tensor) -> None:
        """Keep a microbatch's rows until its whole group can be cut into pieces."""
        group = routing.group_of[microbatch]
        collected = self.leaving.setdefault((kind, group), _Rows({}, len(routing.places(group))))
        collected.of_microbatch[microbatch] = rows


@dataclass
class _Pieces:
    """A group's buffers, until the last of its microbatches has taken its rows."""

    of_place: dict[Place, Tensor]
    microbatches_left: int


@dataclass
class _Rows:
    """A group's rows by microbatch, until the last piece has been cut from them."""

    of_microbatch: dict[int, Tensor]
    pieces_left: int


def _stage(action: Action) -> int:
    assert action.stage is not None
    return action.stage


def _edge(tensor: Tensor) -> GradientEdge | None:
    """The end of the graph that made a tensor, without the tensor; ``None`` if nothing trained has led to it."""
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def _gradient(tensor: Tensor) -> Tensor:
    """The gradient that has reached a leaf; zeros if nothing depends on it."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
