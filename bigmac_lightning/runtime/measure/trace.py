"""Records when each action of a step ran, by the device's own clock, and writes a Chrome/Perfetto trace of all
ranks."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from bigmac_lightning.schedule.action import Action

Mark = float | torch.cuda.Event
"""A time: seconds of a clock of the CPU, or an event on a stream."""


class Span(NamedTuple):
    """One executed action.

    Attributes:
        action: the action's text.
        start, end: its times in seconds since the trace began.
    """

    action: str
    start: float
    end: float


class Trace:
    """Records the spans of one rank. On CUDA it records events on the current stream, so that the CPU need not wait for
    the device.

    Attributes:
        origin_seconds: time of ``time.perf_counter`` at which the trace began.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Action, Mark, Mark]] = []
        self._waits: list[tuple[int, Mark, Mark]] = []  # each after so many actions
        self._origin = self._now()
        self.origin_seconds = time.perf_counter()

    @contextmanager
    def action(self, action: Action) -> Iterator[None]:
        """Record the block as the execution of `action`."""
        start = self._now()
        yield
        self._marks.append((action, start, self._now()))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Record that the block waits for a message."""
        start = self._now()
        yield
        self._waits.append((len(self._marks), start, self._now()))

    def is_over(self) -> bool:
        """Whether the device is done with all actions so far. Nothing waits for it."""
        return not self._cuda or not self._marks or self._marks[-1][2].query()  # pyright: ignore

    def durations(self) -> list[tuple[Action, float]]:
        """The seconds for which each action so far has kept its rank busy: with itself, and with what was done between
        the action before and it, but for waiting. The device must be done with them."""
        ends = [end for _, _, end in self._marks]
        begins = [start for _, start, _ in self._marks[:1]] + ends[:-1]
        found = [self._between(begin, end) for begin, end in zip(begins, ends, strict=True)]
        for number, start, end in self._waits:
            if 0 < number < len(found):
                found[number] -= self._between(start, end)
        return [(action, max(seconds, 0.0)) for (action, _, _), seconds in zip(self._marks, found, strict=True)]

    def bounds(self) -> tuple[float, float]:
        """When the first action began and the last one ended, in seconds since the trace began. The device must be done
        with them, and there must be one."""
        return self._between(self._origin, self._marks[0][1]), self._between(self._origin, self._marks[-1][2])

    def elapsed(self) -> float:
        """Seconds since the trace began, by the device's clock. On CUDA, this waits until the device has finished."""
        now = self._now()
        if self._cuda:
            torch.cuda.synchronize()
        return self._between(self._origin, now)

    def spans(self) -> list[Span]:
        """Return all spans so far. On CUDA, this waits until the device has finished."""
        if self._cuda:
            torch.cuda.synchronize()
        since = self._origin
        return [Span(str(a), self._between(since, start), self._between(since, end)) for a, start, end in self._marks]

    def _now(self) -> "Mark":
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, one: "Mark", other: "Mark") -> float:
        """The seconds from one mark to the other."""
        if isinstance(one, torch.cuda.Event):
            assert isinstance(other, torch.cuda.Event)
            return one.elapsed_time(other) / 1e3
        assert isinstance(other, float)
        return other - one


def write_chrome_trace(
    path: Path,
    ranks: Sequence[Sequence[Span]],
    messages: Sequence[tuple[tuple[int, str], tuple[int, str]]] = (),
    memory: Sequence[Sequence[tuple[float, str, int]]] = (),
) -> None:
    """Write the spans of all ranks as one trace with a row per rank, for chrome://tracing or Perfetto.

    Args:
        messages: pairs of (rank, action), of the one that sends and the one that needs it, for arrows.
        memory: per rank, a triple (seconds, component, bytes alive from then on) at each change, for counters.
    """
    events: list[dict[str, object]] = []
    for rank, spans in enumerate(ranks):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}})
        events += [
            {
                "ph": "X",
                "name": span.action,
                "cat": span.action.lstrip("0123456789").rstrip("0123456789./"),
                "pid": 0,
                "tid": rank,
                "ts": span.start * 1e6,
                "dur": (span.end - span.start) * 1e6,
            }
            for span in spans
        ]
    times = {
        (rank, span.action): (span.start * 1e6, span.end * 1e6) for rank, spans in enumerate(ranks) for span in spans
    }
    for number, (sender, receiver) in enumerate(messages):
        if sender in times and receiver in times:
            arrow = {"name": "message", "cat": "message", "id": number, "pid": 0}
            events.append({"ph": "s", **arrow, "tid": sender[0], "ts": sum(times[sender]) / 2})
            events.append({"ph": "f", "bp": "e", **arrow, "tid": receiver[0], "ts": sum(times[receiver]) / 2})
    for rank, changes in enumerate(memory):
        for seconds, component, size in changes:
            name = f"rank {rank}: {component}, MiB of activations"
            events.append({"ph": "C", "name": name, "pid": 0, "ts": seconds * 1e6, "args": {"MiB": size / 2**20}})
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
