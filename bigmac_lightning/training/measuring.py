"""Measures how long the actions of a training take, and lets all ranks agree on it, so that plans are made from it.

Actions are timed by the device's own clock, and the times are read after the device is done with them, so nothing waits
for that. Ranks exchange what they have found seldom, and less and less often.
"""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from bigmac_lightning.ranks import Ranks
from bigmac_lightning.runtime.measure.trace import Trace
from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.rates import Rate, RateKey, Rates, Sample, mean_rate

WARM_UP = 2
"""Batches at first that are not measured: memory is allocated in them, and code is compiled."""

FIRST, MOST = 6, 64
"""After so many batches ranks exchange what they have found for the first time; after twice as many, and so on, but
after no more than `MOST` further ones."""

KEPT = 512
"""Samples of each kind of action that are kept. A line has two numbers, so a few hundred are plenty."""

CHANGE = 0.05
"""Rates are replaced if one of them differs by more than this: plans must be made anew then, and actions of equal work
differ by a few percent."""


@dataclass
class Busy:
    """The time of this rank in some batches, added up, in seconds.

    Attributes:
        seconds: how long actions have kept it busy; see `Trace.durations`.
        begin, end: from the batch's begin to that of the first action, and to the last action's end.
    """

    seconds: float = 0.0
    begin: float = 0.0
    end: float = 0.0


class Measuring:
    """What this rank has measured, and what all ranks have agreed on.

    Attributes:
        rates: what they have agreed on last; ``None``: nothing yet.
        busy: the time of this rank in the batches that were timed since somebody has set this.

    Args:
        ranks: all processes.
        meeting: the kinds of actions inside which ranks wait for each other.
    """

    def __init__(self, ranks: Ranks, device: torch.device, meeting: Collection[str] = ()) -> None:
        self._ranks, self._device, self._meeting = ranks, device, meeting
        self.rates: Rates | None = None
        self.busy = Busy()
        self.forget()

    def forget(self) -> None:
        """Forget everything: something else is trained now. All ranks must do this together."""
        self.rates = None
        self._samples: dict[RateKey, deque[Sample]] = {}
        self._running = deque[tuple[Trace, Mapping[Action, tuple[int, float]], bool]]()
        self._batches, self._next = 0, FIRST

    def start(self) -> Trace | None:
        """What times the next batch; ``None``: nothing."""
        return Trace(self._device) if self._batches >= WARM_UP else None

    def end(self, trace: Trace | None, work: Mapping[Action, tuple[int, float]], recomputes: bool) -> bool:
        """Note a batch. Collective over all ranks, which must note equally many.

        Args:
            trace: what `start` has returned.
            work: the items of each of this process's actions and the sum of their costs.
            recomputes: whether encoder backwards have run the forwards again.

        Returns: whether the ranks have agreed on other rates.
        """
        self._batches += 1
        if trace is not None:
            self._running.append((trace, work, recomputes))
        while self._running and self._running[0][0].is_over():
            self._take(*self._running.popleft())
        if self._batches < self._next:
            return False
        self._next += min(self._next, MOST)
        return self._agree()

    def finish(self) -> Rates:
        """What all ranks have measured so far. The device must be done with all batches. Collective.

        Raises:
            ValueError: nothing was measured; raised on all ranks.
        """
        while self._running:
            self._take(*self._running.popleft())
        self.rates = None
        self._agree()
        if self.rates is None:
            raise ValueError(f"nothing was measured: at least {WARM_UP + 1} batches with labels are needed")
        return self.rates

    def _take(self, trace: Trace, work: Mapping[Action, tuple[int, float]], recomputes: bool) -> None:
        durations = dict(trace.durations())
        if durations:
            begin, end = trace.bounds()
            busy = self.busy
            self.busy = Busy(busy.seconds + sum(durations.values()), busy.begin + begin, busy.end + end)
        for action, seconds in durations.items():
            if action.kind == "EB" and recomputes:  # the backward alone, as the costs of a plan have it
                seconds = max(seconds - durations[replace(action, kind="EF")], 0.0)
            samples = self._samples.setdefault((action.kind, action.stage), deque(maxlen=KEPT))
            samples.append(Sample(*work[action], seconds))

    def _agree(self) -> bool:
        """Exchange what each rank has found."""
        fitted = {key: (Rate.fit(samples), len(samples)) for key, samples in self._samples.items()}
        own = {key: (rate, number) for key, (rate, number) in fitted.items() if rate is not None}
        everyone: list[dict[RateKey, tuple[Rate, int]]] = self._ranks.exchange(own)()[0]
        keys = dict.fromkeys(key for found in everyone for key in found)
        found = {key: [of[key] for of in everyone if key in of] for key in sorted(keys, key=repr)}
        rates = {key: self._joined(key, of_ranks) for key, of_ranks in found.items()}
        if not rates or (self.rates is not None and not _differ(self.rates, rates)):
            return False
        self.rates = rates
        return True

    def _joined(self, key: RateKey, found: list[tuple[Rate, int]]) -> Rate:
        if key[0] in self._meeting:  # the last rank to come has not waited for others
            return min((rate for rate, _ in found), key=lambda rate: rate.mean)
        return mean_rate([(rate, float(number)) for rate, number in found])


def _differ(before: Rates, now: Rates) -> bool:
    return before.keys() != now.keys() or any(
        abs(now[key].mean - before[key].mean) > CHANGE * before[key].mean for key in now
    )
