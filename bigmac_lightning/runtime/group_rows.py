"""Stores the rows of features or conditions, and their gradients, while they pass between the pieces of a group, which
messages carry, and the group's microbatches, which stages compute.

Messages arrive and leave piece by piece, stages run microbatch by microbatch, and `Routing` maps the rows.
"""

from dataclasses import dataclass, field

from torch import Tensor

from bigmac_lightning.runtime.lowering import Message, MessageKind
from bigmac_lightning.runtime.routing import Place, Routing
from bigmac_lightning.runtime.transport import Transport


@dataclass
class _Pieces:
    """The buffers of a group's pieces, stored until all microbatches of the group that have items have used their
    rows."""

    of_place: dict[Place, Tensor]
    microbatches_left: int


@dataclass
class _Rows:
    """The rows of a group's microbatches, stored until all pieces of the group have been made from them."""

    pieces_left: int
    of_microbatch: dict[int, Tensor] = field(default_factory=dict)


class GroupRows:
    """The stored rows of one layout.

    Args:
        routing: the layout of the rows.
        transport: gives the messages that have arrived.
    """

    def __init__(self, routing: Routing, transport: Transport) -> None:
        self._routing, self._transport = routing, transport
        self._received: dict[tuple[MessageKind, int], _Pieces] = {}
        self._collected: dict[tuple[MessageKind, int], _Rows] = {}

    @property
    def remaining(self) -> list[tuple[MessageKind, int]]:
        """Kind and group of everything that is still stored."""
        return [*self._received, *self._collected]

    def gather(self, kind: MessageKind, microbatch: int) -> Tensor:
        """Return a microbatch's rows from the messages for its group. The group's first call waits for all its
        pieces."""
        routing, group = self._routing, self._routing.group_of[microbatch]
        pieces = self._received.get((kind, group))
        if pieces is None:
            buffers = {place: self._transport.take(Message(kind, group, *place)) for place in routing.places(group)}
            pieces = self._received[kind, group] = _Pieces(buffers, sum(map(routing.has_items, routing.groups[group])))
        pieces.microbatches_left -= 1
        if not pieces.microbatches_left:
            del self._received[kind, group]
        return routing.gather(microbatch, pieces.of_place)

    def collect(self, kind: MessageKind, microbatch: int, rows: Tensor) -> None:
        """Store a microbatch's rows until those of its whole group are there and can be cut into pieces."""
        group = self._routing.group_of[microbatch]
        collected = self._collected.setdefault((kind, group), _Rows(len(self._routing.places(group))))
        collected.of_microbatch[microbatch] = rows

    def piece(self, message: Message) -> Tensor:
        """Return the tensor of a message with a piece, once the rows of its whole group are collected."""
        key = message.kind, message.index
        rows = self._collected[key]
        rows.pieces_left -= 1
        if not rows.pieces_left:
            del self._collected[key]
        return self._routing.scatter(message.index, (message.place, message.piece), rows.of_microbatch)
