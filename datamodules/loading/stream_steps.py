"""Steps of streams. Every process reads one buffer of examples after another, packs it, and deals it into steps.

A buffer is extended until it fills whole steps. So no example is carried over to the next buffer, and a position in the
data is the start of a buffer and a number of steps.

Streams are read in parts, each of which has buffers of its own; steps come from the parts in turn. Of W workers, worker
w makes the batches of steps w, w + W, w + 2 W, ...: a DataLoader takes one batch from each worker in turn, which puts
the steps into their order again. A worker reads and packs all buffers of the parts that any of its steps comes from,
since which step an example belongs to depends on the sizes of all examples in its buffer. With W parts that is one of
them; with one part, each worker reads everything.
"""

import hashlib
import math
import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ..encoding.chat import ChatEncoder
from ..errors import ExampleError, SourceError, reason_of
from ..example import Example
from ..options import PackingOptions
from ..packing.epoch import StepSize
from ..packing.measuring import encoded, name_of
from ..packing.packing import Bin, Bins, deal, llm_cost, pack
from ..packing.steps import order_settings
from ..sources.stream import Stream
from .agreed_loader import Position, Progress
from .collate import Sample
from .mixture import Mixture
from .source_loader import costliest_first


@dataclass(frozen=True)
class StreamStep:
    """The samples of one step of one replica, by microbatch."""

    microbatches: list[list[Sample]]
    progress: Progress


@dataclass(frozen=True)
class _Buffer:
    """
    Attributes:
        samples: in the order in which they were read.
        left_out: the reasons why other examples were left out.
        bins: bins that the samples fit into, by their indices.
    """

    samples: list[Sample]
    left_out: list[str]
    bins: list[Bin]

    def checksum(self) -> int:
        """56 bits of a hash of names and tokens."""
        state = hashlib.sha256()
        for sample in self.samples:
            state.update(sample.name.encode())
            state.update(np.array(sample.tokens, dtype=np.int64).tobytes())
        return int.from_bytes(state.digest()[:7], "big")


class StreamSteps(IterableDataset):
    """An endless dataset of steps; in a worker, those that are the worker's.

    Attributes:
        positions: where reading of each part begins, and `first`, the number of the part that the first step comes
            from; they must be set before the first step is asked for.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        weights: Sequence[float],
        encoder: ChatEncoder,
        size: StepSize,
        packing: PackingOptions,
        seed: int,
        replicas: int,
        replica: int,
        parts: int = 1,
    ) -> None:
        self.streams, self.weights, self.encoder = streams, weights, encoder
        self.size, self.packing = size, packing
        self.seed, self.replicas, self.replica = seed, replicas, replica
        start = [{"name": stream.name, "repeat": 0, "place": None, "drawn": 0} for stream in streams]
        self.positions: list[Position] = [{"streams": start, "buffer": 0, "step": 0}] * parts
        self.first = 0

    def fingerprint(self) -> str:
        """A hash of everything that the steps of a buffer depend on, except its examples."""
        settings = (order_settings(self.size, self.packing), list(self.weights), self.seed, self.replicas)
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]

    def __iter__(self) -> Generator[StreamStep | SourceError, None, None]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        parts = len(self.positions)
        shared = math.gcd(parts, workers)  # its steps come from every so manyeth part
        reading = {part: self._steps(part) for part in range(parts) if (part - self.first - worker) % shared == 0}
        try:
            for number in count(worker % shared, shared):
                step = next(reading[(self.first + number) % parts])
                if number % workers == worker:
                    yield step
        except SourceError as error:  # all ranks must know it before any rank raises it
            yield error

    def _steps(self, part: int) -> Iterator[StreamStep]:
        """The steps of a part."""
        position, parts = self.positions[part], len(self.positions)
        mixture = Mixture([stream.part(part, parts) for stream in self.streams], self.weights, position)
        while True:
            buffer = self._read(mixture, part)
            next_buffer: Position = {"streams": mixture.streams, "buffer": position["buffer"] + 1, "step": 0}
            steps = self._deal(buffer, f"{part}/{position['buffer']}")
            checksum = buffer.checksum()
            for k in range(position["step"], len(steps)):
                microbatches = [[buffer.samples[i] for i in b] for b in steps[k][self.replica]]
                if not self.packing.ordered:
                    microbatches = costliest_first(microbatches)
                after = {**position, "step": k + 1} if k + 1 < len(steps) else next_buffer
                yield StreamStep(microbatches, Progress(part, after, () if k else tuple(buffer.left_out), checksum))
            position = next_buffer

    def _read(self, mixture: Mixture, part: int) -> _Buffer:
        """Read a buffer of a part: `buffer_size` samples, and more until they fill whole steps.

        Raises:
            SourceError: more examples in a row than the buffer's size cannot be used.
        """
        bins = Bins(self.size.token_budget, self.packing.ordered)
        bins_per_step = self.replicas * self.size.microbatches
        buffer = _Buffer([], [], bins.bins)
        unusable = 0
        while True:
            which, drawn, example = mixture.draw()
            number = drawn * len(self.positions) + part  # no two examples of a stream have the same
            name = name_of(self.streams[which], number, example if isinstance(example, Example) else None)
            try:
                if isinstance(example, ExampleError):
                    raise example
                budget = self.size.token_budget
                limits, draw = self.streams[which].limits, (which, number)
                sample, _ = encoded(example, self.encoder, budget, name, draw, learns=True, limits=limits)
            except Exception as error:  # every rank encodes this example, and fails in the same way
                buffer.left_out.append(f"{name} {reason_of(error)}")
                unusable += 1
                if unusable > self.packing.buffer_size:
                    raise SourceError(
                        f"{unusable} examples in a row cannot be used; the last: {buffer.left_out[-1]}"
                    ) from error
                continue
            unusable = 0
            is_full = len(buffer.samples) >= self.packing.buffer_size and len(bins.bins) % bins_per_step == 0
            if not bins.add(len(buffer.samples), len(sample.tokens), may_open=not is_full):
                mixture.put_back()
                return buffer
            buffer.samples.append(sample)

    def _deal(self, buffer: _Buffer, number: str) -> list[list[list[Bin]]]:
        """Per step, per replica, the bins."""
        size, packing, bins = self.size, self.packing, buffer.bins
        tokens = [len(sample.tokens) for sample in buffer.samples]
        costs = [llm_cost(n, packing.attention_tokens) for n in tokens]
        if not packing.ordered:
            packed = pack(tokens, costs, size.token_budget)
            bins = packed if len(packed) <= len(bins) else bins  # more bins might need another step
            random.Random(f"{self.seed}/buffer/{number}").shuffle(bins)
        further = [
            [sum(item.cost for item in sample.media) for sample in buffer.samples],
            [sum(item.cost for item in sample.targets) for sample in buffer.samples],
        ]
        return deal(bins, costs, self.replicas, size.microbatches, further)
