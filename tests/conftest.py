"""Every test runs with one torch thread, as several processes share few cores."""

import os
import warnings

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _restored_environment():
    """Lightning's launchers leave MASTER_PORT, LOCAL_RANK, ... behind."""
    before = dict(os.environ)
    with warnings.catch_warnings():
        yield
    os.environ.clear()
    os.environ.update(before)
