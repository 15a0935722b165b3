"""Executes one rank's program: runs the actions, stores the autograd graphs between forward and backward, and passes
tensors to the transport.

The model and the batch come in through `Computation`. The executor stores each tensor from the action that makes it to
the last action that needs it, and no longer, because that is what bounds the memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.autograd.graph import GradientEdge, get_gradient_edge

from bigmac_lightning.runtime import split_backward
from bigmac_lightning.runtime.computation import Computation
from bigmac_lightning.runtime.group_rows import GroupRows
from bigmac_lightning.runtime.lowering import Compute, Done, Hint, Instruction, Message, Needs, Receive, Send, Soon
from bigmac_lightning.runtime.measure.memory import MemoryTracker
from bigmac_lightning.runtime.measure.trace import Trace
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.runtime.progress import Progress
from bigmac_lightning.runtime.randomness import RandomState
from bigmac_lightning.runtime.transport import Transport
from bigmac_lightning.schedule.action import Action


@dataclass
class _Graph:
    """The autograd graph of a stage's forward on a microbatch, stored until its backward.

    Attributes:
        hidden, features: the inputs, which are leaves of the graph.
        outputs: by name (as in `Outcome`), the gradient edge of each output. The output tensors themselves are not
            stored: the graph saves those that its backward needs, and the others can be freed.
    """

    hidden: Tensor | None
    features: Tensor | None
    outputs: dict[str, GradientEdge]

    @property
    def inputs(self) -> list[Tensor]:
        """The inputs that need gradients."""
        return [x for x in (self.hidden, self.features) if x is not None and x.requires_grad]


class Executor:
    """Executes programs on one rank.

    Args:
        mesh: the process groups.
        stage_rank: pipeline rank of each stage.
        memory: counts the bytes of activations per component; ``None`` means that they are not counted.
        trace: records when each action ran; ``None`` means that it is not recorded.

    Attributes:
        timing: records it as well, and waiting for messages, for those who measure a training.
        progress: says what this rank is doing.
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
        self.timing: Trace | None = None
        self.splits: split_backward.Splits = {}
        self.progress = Progress()

    def run(
        self,
        program: Sequence[Instruction],
        computation: Computation,
        needs: Needs,
        recompute: bool = False,
        hear: Callable[[Hint], None] | None = None,
    ) -> None:
        """Execute one step. Gradients are added to the parameters' ``.grad``.

        Args:
            program: this rank's program.
            computation: the model and the batch.
            needs: the parts of the step that need gradients, as for ``lower``.
            recompute: whether encoder forwards save no activations, so that encoder backwards run the forward again.
            hear: is called with the program's hints.

        Raises:
            Exception: any error of the model; a note names the pipeline rank and the action in which it occurred.
        """
        step = _Step(self, computation, needs, recompute)
        for instruction in program:
            self.progress.begin(instruction)
            try:
                if not isinstance(instruction, Done | Soon):
                    step.run(instruction)
                elif hear is not None:
                    hear(instruction)
            except Exception as error:
                where = instruction.action if isinstance(instruction, Compute) else instruction
                error.add_note(f"in {where} on pipeline rank {self.mesh.pp_rank} of {self.mesh.pp_size}")
                raise
        self.progress.begin("the end of the batch's program")
        step.finish()


class _Step:
    """The state of one step: the tensors and graphs that later actions of this rank need.

    Attributes:
        graphs: by (stage, microbatch), from F to B or I.
        deferred: by (stage, microbatch), from I to W.
        encoded: by (group, piece), from EF to EB: the edge of the features, the state of the random number generators
            if the step recomputes, or ``None`` if no gradient is needed.
        features: rows of features and of their gradients, between pieces and microbatches.
        conditions: rows of conditions and of their gradients, between pieces and microbatches.
    """

    def __init__(self, executor: Executor, computation: Computation, needs: Needs, recompute: bool) -> None:
        self.executor, self.computation, self.needs, self.recompute = executor, computation, needs, recompute
        self.rank = executor.mesh.pp_rank
        self.last = len(executor.stage_rank) - 1
        self.transport = Transport(executor.mesh, executor.progress, executor.timing)
        self.graphs: dict[tuple[int, int], _Graph] = {}
        self.deferred: dict[tuple[int, int], split_backward.Deferred] = {}
        self.encoded: dict[tuple[int, int], GradientEdge | RandomState | None] = {}
        self.features = GroupRows(computation.features, self.transport)
        self.conditions = GroupRows(computation.conditions, self.transport)
        self.handlers: dict[str, Callable[[Action], Mapping[str, Tensor]]] = {
            "EF": self.encode,
            "EB": self.encode_backward,
            "F": self.forward,
            "B": self.backward,
            "I": self.backward_input,
            "W": self.backward_weight,
            "G": self.generate,
        }

    def run(self, instruction: Compute | Send | Receive) -> None:
        """Execute one instruction."""
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
        """Wait for all sends, and check that every stored tensor and graph was used."""
        self.transport.finish()
        remaining = [*self.graphs, *self.deferred, *self.encoded, *self.features.remaining, *self.conditions.remaining]
        assert not remaining, f"still stored at the end of the step: {remaining}"

    def shape(self, message: Message) -> tuple[int, ...]:
        """Return the shape of a message's tensor, which the receiver must know without asking the sender."""
        if message.kind == "hidden":
            return self.computation.hidden_shape(message.index, message.place)
        if message.kind == "hidden_grad":
            return self.computation.hidden_shape(message.index, message.place + 1)
        routing = self.computation.features if message.kind.startswith("features") else self.computation.conditions
        return (routing.rows(message.index, (message.place, message.piece)), self.computation.width)

    def content(self, message: Message, results: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor of a message, after the action that produces it. `results` are the action's tensors by
        kind."""
        if message.kind == "features_grad":  # lowering asks for it after the group's last microbatch
            return self.features.piece(message)
        if message.kind == "conditions":  # likewise
            return self.conditions.piece(message)
        return results[message.kind]

    @contextmanager
    def computing(self, action: Action, component: str, grad: bool) -> Iterator[None]:
        """The context in which the model computes an action: gradients are on or off, and bytes and time are
        measured."""
        memory, trace, timing = self.executor.memory, self.executor.trace, self.executor.timing
        counted: AbstractContextManager[None] = memory.component(component) if memory is not None else nullcontext()
        recorded = trace.action(action) if trace is not None else nullcontext()
        timed = timing.action(action) if timing is not None else nullcontext()
        named = torch.profiler.record_function(str(action)) if profiler._is_profiler_enabled else nullcontext()
        with torch.set_grad_enabled(grad), recorded, timed, counted, named:
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
            if output is not None:  # it is None if the piece has only items of a frozen encoder, or no items
                split_backward.backward([output], [gradient])
        return {}

    def _encode(self, action: Action) -> Tensor:
        """Return the features of an EF's piece, [rows, width]."""
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
            features = self.features.gather("features", microbatch)
            features.requires_grad_(self.needs.encoded[microbatch])
        with self.computing(action, "llm", grad):
            outcome = self.computation.forward(stage, microbatch, hidden, features)
        if grad:
            outputs = {"hidden": outcome.hidden, "loss": outcome.loss, "conditions": outcome.conditions}
            edges = {name: _edge(output) for name, output in outputs.items() if output is not None}
            ends = {name: edge for name, edge in edges.items() if edge is not None}
            self.graphs[stage, microbatch] = _Graph(hidden, features, ends)
        if outcome.conditions is not None:
            self.conditions.collect("conditions", microbatch, outcome.conditions.detach())
        return {} if outcome.hidden is None else {"hidden": outcome.hidden.detach()}

    def backward(self, action: Action) -> Mapping[str, Tensor]:
        graph, edges, gradients = self._backward_start(action)
        with self.computing(action, "llm", grad=True):
            split_backward.backward(edges, gradients)
        return self._input_gradients(action, graph)

    def backward_input(self, action: Action) -> Mapping[str, Tensor]:
        graph, edges, gradients = self._backward_start(action)
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

    def _backward_start(self, action: Action) -> tuple[_Graph | None, list[GradientEdge], list[Tensor | None]]:
        """Return a stage's graph for a microbatch, the edges of its outputs, and their gradients.

        The generators send gradients for a whole group or for none of it. They are received even if this microbatch
        needs no gradient, and are then not used.
        """
        stage, microbatch = _stage(action), action.index
        graph = self.graphs.pop((stage, microbatch), None)
        output_gradients: dict[str, Tensor | None] = {"loss": None}
        if graph is not None and stage < self.last:
            output_gradients["hidden"] = self.transport.take(Message("hidden_grad", microbatch, stage))
        if (
            stage == self.last
            and self.computation.conditions.has_items(microbatch)
            and self._conditions_have_gradients(microbatch)
        ):
            output_gradients["conditions"] = self.conditions.gather("conditions_grad", microbatch)
        outputs = {} if graph is None else graph.outputs
        return graph, list(outputs.values()), [output_gradients[name] for name in outputs]

    def _input_gradients(self, action: Action, graph: _Graph | None) -> Mapping[str, Tensor]:
        """Return the gradients of a backward for the stage before; store those for the encoders until the whole group's
        are there."""
        stage, microbatch = _stage(action), action.index
        if stage == 0 and self.needs.encoder and self.computation.features.has_items(microbatch):
            features = None if graph is None else graph.features
            rows = self.computation.features.rows_of(microbatch)
            gradient = self._zeros(rows) if features is None else _gradient(features)
            self.features.collect("features_grad", microbatch, gradient)
        if graph is not None and graph.hidden is not None and graph.hidden.requires_grad:
            return {"hidden_grad": _gradient(graph.hidden)}
        return {}

    def _conditions_have_gradients(self, microbatch: int) -> bool:
        """Whether the generators send gradients for the conditions of the microbatch's group."""
        group = self.computation.conditions.groups[self.computation.conditions.group_of[microbatch]]
        return any(self.needs.through(self.last, m) for m in group)

    def _zeros(self, rows: int) -> Tensor:
        """Return zeros, [rows, width], for the gradient of features that need none."""
        return torch.zeros(rows, self.computation.width, dtype=self.computation.dtype, device=self.executor.mesh.device)

    # -- generator -------------------------------------------------------------------------------------------------

    def generate(self, action: Action) -> Mapping[str, Tensor]:
        conditions = self.transport.take(Message("conditions", action.index, self.rank, action.piece))
        needs_gradient = any(self.needs.through(self.last, m) for m in self.computation.conditions.groups[action.index])
        conditions.requires_grad_(needs_gradient)
        with self.computing(action, "generator", needs_gradient or self.needs.generator):
            loss = self.computation.generate(action.index, action.piece, conditions)
            if loss is not None and loss.requires_grad:
                loss.backward()
        return {"conditions_grad": _gradient(conditions)} if needs_gradient else {}


def _stage(action: Action) -> int:
    assert action.stage is not None
    return action.stage


def _edge(tensor: Tensor) -> GradientEdge | None:
    """Return the gradient edge of a tensor; ``None`` if the tensor needs no gradient."""
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def _gradient(tensor: Tensor) -> Tensor:
    """Return the gradient of a leaf; zeros if the loss does not depend on the leaf."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
