"""Every test runs with one torch thread, as several processes share few cores. A server that speaks S3."""

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator

import pytest
import torch

from tests.ranks import free_port

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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A server, whose address and keys are in the environment, as s3fs looks for them."""
    import s3fs  # which takes a second

    address = f"http://127.0.0.1:{(port := free_port())}"
    log = (tmp_path_factory.mktemp("server") / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=subprocess.STDOUT
    )
    given = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    given["AWS_DEFAULT_REGION"] = "us-east-1"
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        system = s3fs.S3FileSystem(skip_instance_cache=True)
        for _ in range(300):
            try:
                system.mkdir("shards")
                break
            except Exception:
                assert process.poll() is None, "the server has ended"
                time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait()
        log.close()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
