"""Loaders that a test makes end with it."""

from collections.abc import Iterator

import pytest

from tests.datamodules.examples import LOADERS


@pytest.fixture(autouse=True)
def _workers_end() -> Iterator[None]:
    yield
    while LOADERS:
        LOADERS.pop()._iterator = None
