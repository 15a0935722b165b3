"""What the processes of a run tell each other outside of their process groups, which may be where they hang.

Notes go through the store by which torch's processes have found each other. Each process reads and writes with a
connection of its own, because a thread that waits for the store holds up all others on its connection.
"""

import json
import threading
from collections.abc import Callable
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

ANSWERS_WITHIN = 5.0
"""Seconds after which the store is taken for lost."""


class Board:
    """Notes of the processes of a run, by name. A later note replaces an earlier one of the same name.

    Args:
        name: a name that no other board of these processes has.

    Raises:
        OSError, RuntimeError: each method, if the store does not answer.
    """

    def __init__(self, name: str) -> None:
        self._store = PrefixStore(f"bigmac/{name}", _get_default_store().clone())
        self._stuck: threading.Thread | None = None

    def post(self, name: str, note: Any) -> None:
        """Write a note; anything that JSON can hold."""
        self._answered(lambda: self._store.set(name, json.dumps(note)))

    def post_first(self, name: str, note: Any) -> Any:
        """Write a note unless there is one of that name; return the one that is there then."""
        return self._answered(lambda: json.loads(self._store.compare_set(name, "", json.dumps(note))))

    def read(self, name: str) -> Any:
        """A note; ``None`` if there is none."""
        return self._answered(lambda: json.loads(self._store.get(name)) if self._store.check([name]) else None)

    def _answered(self, ask: Callable[[], Any]) -> Any:
        """The result of a call, in a thread of its own: if the process that has the store is stopped, it never ends."""
        if self._stuck is not None and self._stuck.is_alive():
            raise TimeoutError("the store does not answer")
        answers: list[Any] = []
        errors: list[Exception] = []

        def run() -> None:
            try:
                answers.append(ask())
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(ANSWERS_WITHIN)
        if thread.is_alive():
            self._stuck = thread
            raise TimeoutError("the store does not answer")
        if errors:
            raise errors[0]
        return answers[0]
