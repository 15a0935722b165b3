"""How long an action keeps its rank busy: with what is done between actions, without waiting."""

import torch

from bigmac_lightning.runtime.measure.trace import Trace
from bigmac_lightning.schedule.action import Action


class Scripted(Trace):
    """A trace by a clock that a test sets."""

    clock = 0.0

    def _now(self) -> float:
        return self.clock


def test_busy_times() -> None:
    trace, actions = Scripted(torch.device("cpu")), [Action("EF", 0), Action("F", 0, 0), Action("B", 0, 0)]
    for number, action in enumerate(actions):
        with trace.waiting():
            trace.clock += 30
        trace.clock += 2  # between actions
        with trace.waiting():
            trace.clock += 5 * number
        with trace.action(action):
            trace.clock += 10 + number
    with trace.waiting():
        trace.clock += 50
    assert trace.durations() == [(actions[0], 10.0), (actions[1], 13.0), (actions[2], 14.0)]
    assert [span.end - span.start for span in trace.spans()] == [10.0, 11.0, 12.0]
    assert Scripted(torch.device("cpu")).durations() == []
