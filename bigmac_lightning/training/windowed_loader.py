"""Batches whose gradients are accumulated, read together: each of them then knows how much there is to learn from all.

Lightning divides the loss of each batch by the number of batches, a mean of means; for the mean over all tokens, the
counts of the whole optimizer step have to be known before its first batch. Knows loaders and Lightning's loop; knows
nothing of pipelines.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl

from bigmac_lightning.checkpoints.resuming import uncounted
from bigmac_lightning.contracts.batch import Batch


def windowed(loader: Any, trainer: pl.Trainer, counts: Callable[[Batch], Sequence[float]]) -> "WindowedLoader":
    """A training loader around another one.

    Args:
        counts: what a batch's losses are divided by.
    """
    stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    return (_StatefulWindowedLoader if stateful else WindowedLoader)(loader, trainer, counts)


class WindowedLoader:
    """Sets `Batch.window` of each batch to the sum of the counts of all batches of its optimizer step."""

    def __init__(self, loader: Any, trainer: pl.Trainer, counts: Callable[[Batch], Sequence[float]]) -> None:
        self.loader, self._trainer, self._counts = loader, trainer, counts
        self._before: dict[str, Any] | None = None  # of the loader, where the current window begins
        self._state: dict[str, Any] | None = None  # behind the batch that was given last

    @property
    def sampler(self) -> Any:
        """What Lightning tells the epoch to."""
        return getattr(self.loader, "sampler", None)

    @property
    def batch_sampler(self) -> Any:
        return getattr(self.loader, "batch_sampler", None)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        given = self._trainer.fit_loop.epoch_loop.batch_progress.current.ready  # more than 0 where a run is resumed
        batches = iter(self.loader)
        self._state = self._loader_state()
        while window := self._read(batches, given):
            self._before = self._state
            known = [self._counts(batch) for batch, _ in window if isinstance(batch, Batch)]  # others are refused later
            total = [sum(column) for column in zip(*known, strict=True)]
            for batch, self._state in window:
                yield batch.replace(window=total) if isinstance(batch, Batch) else batch
            given += len(window)

    def _read(self, batches: Iterator[Any], given: int) -> list[tuple[Any, dict[str, Any] | None]]:
        """The next optimizer step's batches, each with the loader's state behind it; fewer at the end of an epoch."""
        size = self._trainer.accumulate_grad_batches - given % self._trainer.accumulate_grad_batches
        limit = self._trainer.num_training_batches - given
        window: list[tuple[Any, dict[str, Any] | None]] = []
        while len(window) < min(size, limit):
            try:
                batch = next(batches)
            except StopIteration:
                break
            window.append((batch, self._loader_state()))
        return window

    def _loader_state(self) -> dict[str, Any] | None:
        return None


class _StatefulWindowedLoader(WindowedLoader):
    """Its state is that of the loader behind the last optimizer step's batches, not behind those that were read."""

    def state_dict(self) -> dict[str, Any]:
        state = self._before if uncounted(self._trainer) else self._state
        return self.loader.state_dict() if state is None else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)
        self._before = self._state = None

    def _loader_state(self) -> dict[str, Any] | None:
        return dict(self.loader.state_dict())
