"""How the processes of a run meet: who is missing, whose numbers do not fit, a store that is older than they are."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import TCPStore

from bigmac_lightning.runtime import meeting
from bigmac_lightning.runtime.meeting import Place, meet
from tests.ranks import free_port


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of the store that an agent of torchrun has made for its workers."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(meeting, "TELL_EVERY", 0.5)
    monkeypatch.setattr(meeting, "TO_TELL", 1.0)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    yield store.port
    del store  # its server ends


def _all(come: Callable[..., Any], *places: Place, seconds: float = 20.0) -> tuple[list[Any], list[str]]:
    """What each has come to, and what was told."""
    told: list[str] = []

    def one(place: Place) -> Any:
        try:
            return come(place, timedelta(seconds=seconds), told.append)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(one, places)), told


def _places(port: int, *ranks: int, world_size: int) -> list[Place]:
    return [Place("127.0.0.1", port, rank, world_size) for rank in ranks]


def test_a_store_that_is_older_than_the_processes(port: int) -> None:
    """Each attempt has keys of its own, whoever reaches the store first."""
    for attempt in range(3):
        order = (0, 1, 2) if attempt % 2 else (2, 1, 0)
        stores, told = _all(meet, *_places(port, *order, world_size=3))
        assert not told
        assert not stores[0].check(["key"]), "the note of an attempt before"
        stores[0].set("key", str(attempt))
        assert [store.get("key") for store in stores] == [str(attempt).encode()] * 3


@pytest.mark.parametrize(
    ("come", "missing"),
    [((0, 2), "rank 1 is missing, ranks 0, 2 are there"), ((0,), "ranks 1, 2 are missing, rank 0 is there")],
)
def test_a_rank_that_does_not_come_is_named(port: int, come: tuple[int, ...], missing: str) -> None:
    _all(meet, *_places(port, 0, 1, 2, world_size=3))  # an attempt before, in which all came
    errors, told = _all(meet, *_places(port, *come, world_size=3), seconds=1.5)
    for error in errors:
        assert isinstance(error, TimeoutError)
        assert f"127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT), WORLD_SIZE=3: {missing}" in str(error)
    assert told
    assert all(text.startswith("rank 0 has waited for") and text.endswith(missing) for text in told)


@pytest.mark.parametrize("before", [False, True])
def test_rank_0_that_does_not_come_is_named(port: int, before: bool) -> None:
    if before:
        _all(meet, *_places(port, 0, 1, world_size=2))
    errors, told = _all(meet, *_places(port, 1, world_size=2), seconds=1.0)
    assert isinstance(errors[0], TimeoutError)
    for text in (str(errors[0]), *told):
        assert re.match("rank 1 has waited for . s at .*rank 0 is missing.*, and rank 0 has not called", text)
    assert told


def test_different_world_sizes(port: int) -> None:
    places = [*_places(port, 0, 1, world_size=3), *_places(port, 2, world_size=4)]
    for error in _all(meet, *places)[0]:
        assert isinstance(error, ValueError)
        assert re.search(r"different WORLD_SIZE: 3 on rank 0 \(.*\), 4 on rank 2 \(", str(error))


def test_the_same_rank_twice(port: int) -> None:
    for error in _all(meet, *_places(port, 0, 1, 1, world_size=3))[0]:
        assert isinstance(error, ValueError)
        assert re.search(r"two processes that meet at .* have RANK=1: .*, process \d+ and ", str(error))


def test_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "TELL_EVERY", 0.5)
    errors, told = _all(meet, *_places(free_port(), 1, world_size=2), seconds=1.0)
    assert isinstance(errors[0], TimeoutError)
    assert all("nothing answers there" in text for text in (str(errors[0]), *told))
    assert told
