"""Loaders of training batches as others make them."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader


class Places(DataLoader[Any]):
    """A stateful loader as others make them: an iterator looks at the state as soon as it is made."""

    start = given = 0

    def __iter__(self) -> Any:
        self.given, self.start = self.start, 0
        return self._rest(self.given)

    def _rest(self, first: int) -> Iterator[Any]:
        for batch in islice(super().__iter__(), first, None):
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["given"]
