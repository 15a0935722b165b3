"""What the processes of a run tell each other outside of their process groups, which may be where they hang.

Notes go through the store by which torch's processes have found each other. Each process reads and writes with a
connection of its own, because a thread that waits for the store holds up all others on its connection.
"""

import json
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

ANSWERS_WITHIN = timedelta(seconds=5)


class Board:
    """Notes of the processes of a run, by name. A later note replaces an earlier one of the same name.

    Args:
        name: a name that no other board of these processes has.

    Raises:
        dist.DistError: each method, if the store does not answer.
    """

    def __init__(self, name: str) -> None:
        store = _get_default_store().clone()
        store.set_timeout(ANSWERS_WITHIN)
        self._store = dist.PrefixStore(f"bigmac/{name}", store)

    def post(self, name: str, note: Any) -> None:
        """Write a note; anything that JSON can hold."""
        self._store.set(name, json.dumps(note))

    def read(self, name: str) -> Any:
        """A note; ``None`` if there is none."""
        return json.loads(self._store.get(name)) if self._store.check([name]) else None
