"""Steps made of streams: a window of examples at a time is read, packed and dealt, by every process alike.

A window has as many examples as fill whole steps, so that nothing is carried from one to the next, and a position is a
window's start and a number of steps. Every worker of every rank reads all windows; of W workers, each makes the batch
of every W-th step. Knows streams, sizes and replicas; knows no process groups.
"""

import hashlib
import logging
import random
from bisect import bisect_left, insort
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from bigmac_lightning.contracts.batch import Batch

from ..encoding.chat import ChatEncoder
from ..example import Example, ExampleError
from ..options import PackingOptions
from ..packing.measuring import encoded, name_of, reason_of
from ..packing.packing import deal, llm_cost, pack
from ..packing.steps import StepSize
from ..sources.stream import Stream
from .collate import Sample
from .failures import Agreement, SourceError
from .loader import AgreedLoader, Position, Progress, StepCollate, agreed, dearest_first

log = logging.getLogger(__name__)

Drawn = tuple[int, int, Example | ExampleError]
"""A stream, how many examples of it were drawn before, and the example."""


class Mixture:
    """Draws from several streams by their shares, from a position on. A stream that has ended begins its next turn.

    Attributes:
        streams: where each stands.
    """

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float], position: Position) -> None:
        self._from = streams
        self._shares = [weight / sum(weights) for weight in weights]
        self._readers: list[Iterator[tuple[Example | ExampleError, Any]] | None] = [None] * len(streams)
        self.streams: list[dict[str, Any]] = list(position["streams"])
        self._before = self.streams
        self._last: Drawn | None = None
        self._again = False

    def draw(self) -> Drawn:
        """The next example, or the last one if it was put back.

        Raises:
            SourceError: a stream is empty, or failed.
        """
        if self._again:
            assert self._last is not None
            self._again, self.streams, self._before = False, self._before, self.streams
            return self._last
        drawn = [stream["drawn"] for stream in self.streams]
        due = [share * (sum(drawn) + 1) - number for share, number in zip(self._shares, drawn, strict=True)]
        at = due.index(max(due))
        try:
            turn, place, example = self._next(at)
        except SourceError:
            raise
        except Exception as error:
            raise SourceError(f"{self._from[at].name} cannot be read: {reason_of(error)}") from error
        self._before = self.streams
        self.streams = list(self.streams)
        self.streams[at] = {**self.streams[at], "turn": turn, "place": place, "drawn": drawn[at] + 1}
        self._last = (at, drawn[at], example)
        return self._last

    def put_back(self) -> None:
        """Give the last example once more."""
        self._again, self.streams, self._before = True, self._before, self.streams

    def _next(self, at: int) -> tuple[int, Any, Example | ExampleError]:
        stand = self.streams[at]
        for turn, place in ((stand["turn"], stand["place"]), (stand["turn"] + 1, None)):
            reader = self._readers[at]
            if reader is None:
                reader = self._readers[at] = self._from[at].read(turn, place)
            for example, behind in reader:
                return turn, behind, example
            self._readers[at] = None
        raise SourceError(f"{self._from[at].name} has no examples")


class Room:
    """What still fits into a window.

    Args:
        step: bins of a step, over all replicas.
        window: examples after which no more steps are begun.
    """

    def __init__(self, token_budget: int, packing: PackingOptions, step: int) -> None:
        self.token_budget, self.packing, self.step = token_budget, packing, step
        self.bins: list[list[int]] = []
        self.samples = 0
        self._rooms: list[tuple[int, int]] = []  # (room, bin), sorted; the last bin's alone if the order is kept

    def add(self, tokens: int) -> bool:
        """Put the next sample into the fullest bin that has room for it, if any has."""
        at = bisect_left(self._rooms, (tokens, -1))
        if at < len(self._rooms):
            room, b = self._rooms.pop(at)
        elif self.samples < self.packing.buffer_size or len(self.bins) % self.step:
            self.bins.append([])
            room, b = self.token_budget, len(self.bins) - 1
        else:
            return False
        self.bins[b].append(self.samples)
        self.samples += 1
        if self.packing.ordered:
            self._rooms.clear()
        insort(self._rooms, (room - tokens, b))
        return True


@dataclass(frozen=True)
class StreamStep:
    """The samples of one step of one replica, microbatch by microbatch."""

    parts: list[list[Sample]]
    progress: Progress


class StreamSteps(IterableDataset):
    """Steps without end; of every W-th worker, every W-th.

    Attributes:
        position: where to begin; set it before the first step is asked for.
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
    ) -> None:
        self.streams, self.weights, self.encoder = streams, weights, encoder
        self.size, self.packing = size, packing
        self.seed, self.replicas, self.replica = seed, replicas, replica
        start = [{"name": stream.name, "turn": 0, "place": None, "drawn": 0} for stream in streams]
        self.position: Position = {"streams": start, "window": 0, "step": 0}

    def fingerprint(self) -> str:
        """Of all that the steps of a window depend on, its examples aside."""
        packing = self.packing
        options = (self.size, packing.buffer_size, packing.ordered, packing.attention_tokens)
        state = repr((options, list(self.weights), self.seed, self.replicas))
        return hashlib.sha256(state.encode()).hexdigest()[:16]

    def __iter__(self) -> Generator[StreamStep | SourceError, None, None]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        try:
            for number, step in enumerate(self._steps()):
                if number % workers == worker:
                    yield step
        except SourceError as broken:  # told to all ranks before it is raised
            yield broken

    def _steps(self) -> Iterator[StreamStep]:
        position = self.position
        mixture = Mixture(self.streams, self.weights, position)
        while True:
            samples, left_out, bins = self._read(mixture)
            after: Position = {"streams": mixture.streams, "window": position["window"] + 1, "step": 0}
            steps = self._deal(samples, bins, position["window"])
            check = _checksum(samples)
            for k in range(position["step"], len(steps)):
                parts = [[samples[i] for i in b] for b in steps[k][self.replica]]
                behind = {**position, "step": k + 1} if k + 1 < len(steps) else after
                yield StreamStep(
                    parts if self.packing.ordered else dearest_first(parts),
                    Progress(behind, () if k else tuple(left_out), check),
                )
            position = after

    def _read(self, mixture: Mixture) -> tuple[list[Sample], list[str], list[list[int]]]:
        """The samples of a window, what was wrong with other examples, and bins that the samples fit into."""
        room = Room(self.size.token_budget, self.packing, self.replicas * self.size.microbatches)
        samples: list[Sample] = []
        left_out: list[str] = []
        in_a_row = 0
        while True:
            at, number, example = mixture.draw()
            name = name_of(self.streams[at], number, example if isinstance(example, Example) else None)
            try:
                if isinstance(example, ExampleError):
                    raise example
                budget = self.size.token_budget
                sample, _ = encoded(example, self.encoder, budget, name, (at, number), learns=True)
            except Exception as error:  # whatever is wrong with it, it is wrong on all ranks
                left_out.append(f"{name} {reason_of(error)}")
                in_a_row += 1
                if in_a_row > self.packing.buffer_size:
                    raise SourceError(
                        f"{in_a_row} examples in a row cannot be used; the last: {left_out[-1]}"
                    ) from error
                continue
            in_a_row = 0
            if not room.add(len(sample.tokens)):
                mixture.put_back()
                return samples, left_out, room.bins
            samples.append(sample)

    def _deal(self, samples: list[Sample], bins: list[list[int]], window: int) -> list[list[list[list[int]]]]:
        size, packing = self.size, self.packing
        tokens = [len(sample.tokens) for sample in samples]
        costs = [llm_cost(n, packing.attention_tokens) for n in tokens]
        if not packing.ordered:
            packed = pack(tokens, costs, size.token_budget, len(tokens))
            bins = packed if len(packed) <= len(bins) else bins
            random.Random(f"{self.seed}/window/{window}").shuffle(bins)
        steps = -(-len(bins) // (self.replicas * size.microbatches))
        return deal(bins, costs, self.replicas, size.microbatches, steps, exact=True)


def _checksum(samples: Sequence[Sample]) -> int:
    """Of names and tokens; 56 bits."""
    state = hashlib.sha256()
    for sample in samples:
        state.update(sample.name.encode())
        state.update(np.array(sample.tokens, dtype=np.int64).tobytes())
    return int.from_bytes(state.digest()[:7], "big")


@dataclass(frozen=True)
class StreamCollate:
    """From a `StreamStep` to its `Batch`, with the data of the items that this process owns."""

    collate: StepCollate

    def __call__(self, step: StreamStep | SourceError) -> Batch | SourceError:
        if isinstance(step, SourceError):
            return step
        batch = self.collate(step.parts)
        return batch.replace(progress=step.progress) if isinstance(batch, Batch) else batch


class StreamLoader(AgreedLoader):
    """Batches that all ranks have agreed on, from any position on.

    Its length is what an epoch is said to have; the next epoch goes on where the last one stopped.

    Attributes:
        same: whether every epoch is the first one.
    """

    def __init__(
        self,
        windows: StreamSteps,
        collate_fn: StreamCollate,
        agreement: Agreement,
        num_workers: int,
        prefetch: int,
        steps: int,
        uncounted: Callable[[], int] | None = None,
        same: bool = False,
    ) -> None:
        super().__init__(windows, None, collate_fn, agreement, num_workers, prefetch, uncounted)
        self.windows, self.steps, self.same = windows, steps, same
        self.epoch = 0
        self._batches: Iterator[Batch] | None = None
        self._start = {"epoch": 0, "step": 0, "skipped": 0, "position": windows.position}
        self.stands = [self._start]

    @property
    def sampler(self) -> "StreamLoader":
        """What Lightning tells the epoch to."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def _iterator(self) -> Any:
        return self._batches

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._batches = iterator  # its workers end with it

    def follow(self, other: "StreamLoader") -> None:
        """Take the place of a loader that has finished an epoch."""
        self.stands = [other.stands[-1]]
        self.agreement.skipped = other.agreement.skipped

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        stand, epoch = self.stands[-1], self.epoch
        given = stand["step"] if self.resumes and stand["epoch"] == epoch else 0
        if self.resumes or self.same or self._batches is None:
            self.windows.position = self._start["position"] if self.same and not given else stand["position"]
            self._batches = agreed(self._loader, self.agreement)
        self.resumes = False
        while given < self.steps:
            batch = next(self._batches)
            progress = batch.progress
            assert isinstance(progress, Progress)
            self.agreement.leave_out(progress.left_out)
            given += 1
            skipped = self.agreement.skipped
            self.reach({"epoch": epoch, "step": given, "skipped": skipped, "position": progress.position})
            yield batch

    def describe(self) -> dict[str, Any]:
        return {"steps": self.steps, "order": self.windows.fingerprint()}

    def stand_of(self, state: dict[str, Any]) -> dict[str, Any]:
        """With other settings, or another number of replicas, the start of the window that the loader was in.

        Raises:
            ValueError: it read other streams.
        """
        position = state["position"]
        now = [stream.name for stream in self.windows.streams]
        saved = [stream["name"] for stream in position["streams"]]
        if saved != now:
            raise ValueError(
                f"the run was saved while it read {saved}, and now it reads {now}: their places are not known. Restore "
                "the sources, or start from the weights alone"
            )
        if position["step"] and state["order"] != self.windows.fingerprint():
            log.warning(
                "data_parallel_size, token_budget, microbatches, window, weights or seed are not as they were when the "
                "run was saved: streams go on at the start of their window, of which %d steps come once more",
                position["step"],
            )
            position = {**position, "step": 0}
        self.agreement.skipped = state["skipped"]
        return {**{name: state[name] for name in ("epoch", "step", "skipped")}, "position": position}
