"""How long an action keeps its rank busy: with what is done between actions, without waiting."""

import time

import pytest
import torch

from bigmac_lightning.runtime.measure.trace import Trace
from bigmac_lightning.schedule.action import Action


def test_busy_times() -> None:
    trace, actions = Trace(torch.device("cpu")), [Action("EF", 0), Action("F", 0, 0), Action("B", 0, 0)]
    time.sleep(0.02)  # before the first action
    for action in actions:
        with trace.waiting():
            time.sleep(0.03)
        time.sleep(0.02)  # between actions
        with trace.action(action):
            time.sleep(0.01)
    with trace.waiting():
        time.sleep(0.05)
    found = dict(trace.durations())
    assert list(found) == actions
    assert found[actions[0]] == pytest.approx(0.01, abs=0.008), "nothing is before it"
    assert [found[action] for action in actions[1:]] == pytest.approx([0.03] * 2, abs=0.012)
    spans = trace.spans()
    assert all(span.end - span.start < 0.02 for span in spans)
