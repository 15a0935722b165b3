"""How the processes of a run meet for the first time, before they have a process group.

They meet in the store at MASTER_ADDR:MASTER_PORT, which may be older than they are: torchrun keeps it when it starts
its workers again. So rank 0 calls the others under a new name each time, and what the run writes later has this name,
too. While torch would wait without a word, ranks say here who is missing, and whose numbers do not fit.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import PrefixStore, Store

from bigmac_lightning.runtime.processes import Process

TELL_EVERY = 60.0
"""Seconds after which a rank says for whom it waits."""

LONGEST_INTERVAL = 0.5
"""Seconds between two looks."""

TO_TELL = 5.0
"""Seconds that other ranks have more than rank 0, so that its error reaches them."""

TO_ANSWER = 5.0
"""Seconds in which a store must answer."""

SHOWN = 16
"""How many ranks a message names."""


class Place(NamedTuple):
    """Where the processes of a run meet, and what this process knows of them.

    Attributes:
        address, port: MASTER_ADDR and MASTER_PORT.
        rank, world_size: global rank of this process, and number of processes.
    """

    address: str
    port: int
    rank: int
    world_size: int


@dataclass(frozen=True)
class _Answer:
    """What a rank has answered to a call of rank 0.

    Attributes:
        token: tells it from processes of other attempts.
        since: when it has begun to wait, as `time.time`.
    """

    rank: int
    world_size: int
    process: str
    token: str
    since: float

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.process})"


def meet(place: Place, timeout: timedelta, tell: Callable[[str], None]) -> Store:
    """Wait until all processes of the run are there. Collective.

    Args:
        timeout: how long to wait.
        tell: is called from time to time with who is missing.

    Returns: a store that only these processes write to.

    Raises:
        TimeoutError: some are missing, or nothing answers at the address; the message names them.
        ValueError: processes have different WORLD_SIZE, or the same RANK; raised on all that have come.
    """
    waiting = _Waiting(place, timeout.total_seconds(), tell)
    store = waiting.connect()
    notes = PrefixStore("bigmac/meeting", store)
    name = waiting.lead(notes) if place.rank == 0 else waiting.follow(notes)
    store.set_timeout(timeout)
    return PrefixStore(f"bigmac/{name}", store)


class _Waiting:
    """A process that waits for the others."""

    def __init__(self, place: Place, seconds: float, tell: Callable[[str], None]) -> None:
        self._place, self._seconds, self._tell = place, seconds, tell
        self._since = self._told = time.monotonic()
        self._interval = 0.01
        self._own = _Answer(place.rank, place.world_size, str(Process.own()), secrets.token_hex(8), time.time())

    def connect(self) -> TCPStore:
        """The store. Rank 0 makes it, unless its torchrun has."""
        place = self._place
        makes = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        while not makes:
            try:  # torch would wait without a word, and hear no signal
                socket.create_connection((place.address, place.port), TO_ANSWER).close()
                break
            except OSError as error:
                self._wait(partial("nothing answers there ({})".format, error))
        return TCPStore(
            place.address,
            place.port,
            is_master=makes,
            timeout=timedelta(seconds=max(TO_ANSWER, self._since + self._seconds - time.monotonic())),
            wait_for_workers=False,
            multi_tenant=True,
        )

    def lead(self, notes: PrefixStore) -> str:
        """Call the other ranks; the name of the meeting at which all of them are."""
        name = secrets.token_hex(8)
        answers = [self._own]
        notes.set("call", name)
        try:
            while len(answers) < self._place.world_size:
                self._wait(partial(_missing, self._place.world_size, answers))
                answers = [self._own, *_answers(notes, name)]
                self._check(answers)
        except (TimeoutError, ValueError) as error:
            _end(notes, name, answers, f"{type(error).__name__}: {error}")
            time.sleep(2 * LONGEST_INTERVAL)  # others must read it before this process ends, which may have the store
            raise
        _end(notes, name, answers)
        return name

    def follow(self, notes: PrefixStore) -> str:
        """Answer rank 0; the name of the meeting at which all ranks are."""
        answered = ""
        while True:
            name = notes.get("call").decode() if notes.check(["call"]) else ""
            if name and name != answered:
                append: Any = notes.append  # pyright: ignore[reportAttributeAccessIssue]
                append(f"{name}/answers", json.dumps(vars(self._own)) + "\n")
                answered = name
            end = json.loads(notes.get(f"{name}/end")) if name and notes.check([f"{name}/end"]) else None
            if end is not None and self._own.token in end["tokens"] and end["error"] is None:
                return name
            if end is not None and (self._own.token in end["tokens"] or end["time"] > self._own.since):
                without = (
                    f"ValueError: the others have met without {self._own}: another process has this RANK, or they "
                )
                error = end["error"] or f"{without}have another WORLD_SIZE than {self._place.world_size}"
                raise (ValueError if error.startswith("ValueError") else TimeoutError)(error.partition(": ")[2])
            called = bool(name) and end is None  # else the call is that of an attempt before this one
            self._wait(partial(self._seen, notes, name if called else None), quiet=called, more=TO_TELL)

    def _seen(self, notes: PrefixStore, name: str | None) -> str:
        """Who is missing, as far as a rank other than 0 knows; `name` is the one by which rank 0 has called."""
        if name is None:
            return f"{_missing(self._place.world_size, [self._own])}, and rank 0 has not called"
        first = _Answer(0, self._place.world_size, "", "", 0.0)
        return _missing(self._place.world_size, [first, *_answers(notes, name)])

    def _check(self, answers: list[_Answer]) -> None:
        """Check that ranks are numbered alike.

        Raises:
            ValueError: they are not.
        """
        place, by_rank = self._place, {}
        for answer in answers:
            if answer.world_size != place.world_size:
                raise ValueError(
                    f"processes that meet at {place.address}:{place.port} have different WORLD_SIZE: "
                    f"{place.world_size} on {self._own}, {answer.world_size} on {answer}. Start all of them with the "
                    "same numbers of nodes and processes"
                )
            other = by_rank.setdefault(answer.rank, answer)
            if other != answer:
                raise ValueError(
                    f"two processes that meet at {place.address}:{place.port} have RANK={answer.rank}: {other.process} "
                    f"and {answer.process}. Give each node a NODE_RANK of its own"
                )

    def _wait(self, why: Callable[[], str], quiet: bool = False, more: float = 0.0) -> None:
        """Wait until the next look.

        Args:
            why: says what this process is waiting for.
            quiet: whether another rank says so.
            more: seconds that it waits longer.

        Raises:
            TimeoutError: it has waited long enough.
        """
        place, now = self._place, time.monotonic()
        where = f"{place.address}:{place.port} (MASTER_ADDR, MASTER_PORT), WORLD_SIZE={place.world_size}"
        if now - self._since > self._seconds + more:
            raise TimeoutError(f"rank {place.rank} has waited for {now - self._since:.0f} s at {where}: {why()}")
        if now - self._told > TELL_EVERY and not quiet:
            self._tell(f"rank {place.rank} has waited for {now - self._since:.0f} s at {where}: {why()}")
            self._told = now
        time.sleep(self._interval)
        self._interval = min(LONGEST_INTERVAL, 1.3 * self._interval)


def _answers(notes: PrefixStore, name: str) -> list[_Answer]:
    if not notes.check([f"{name}/answers"]):
        return []
    return [_Answer(**json.loads(line)) for line in notes.get(f"{name}/answers").decode().splitlines()]


def _end(notes: PrefixStore, name: str, answers: Collection[_Answer], error: str | None = None) -> None:
    """Tell those that have answered that the meeting is over."""
    end: dict[str, Any] = {"tokens": [answer.token for answer in answers], "error": error, "time": time.time()}
    notes.set(f"{name}/end", json.dumps(end))


def _missing(world_size: int, answers: Collection[_Answer]) -> str:
    """Which ranks have not come, in words."""
    there = {answer.rank for answer in answers}
    return f"{_ranks(set(range(world_size)) - there)} missing, {_ranks(there)} there"


def _ranks(ranks: Collection[int]) -> str:
    """ "rank 1 is", or "ranks 1, 2 and 5 more are" """
    if not ranks:
        return "no rank is"
    more = f" and {len(ranks) - SHOWN} more" * (len(ranks) > SHOWN)
    return (
        ("rank " if len(ranks) == 1 else "ranks ")
        + ", ".join(map(str, sorted(ranks)[:SHOWN]))
        + more
        + (" is" if len(ranks) == 1 else " are")
    )
