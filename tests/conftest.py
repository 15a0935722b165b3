"""Every test runs with one torch thread, as several processes share few cores."""

import os
import warnings

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def _policy() -> int | None:
    """How this process is scheduled, where the system says it."""
    return os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None


@pytest.fixture(autouse=True)
def _restored_environment():
    """Lightning's launchers leave MASTER_PORT, LOCAL_RANK, ... behind."""
    before, policy = dict(os.environ), _policy()
    with warnings.catch_warnings():
        yield
    os.environ.clear()
    os.environ.update(before)
    assert _policy() == policy, "the test has changed the priority of all that comes after it"
