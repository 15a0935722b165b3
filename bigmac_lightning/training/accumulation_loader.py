"""Reads all batches of an optimizer step before the first of them is used, so that each batch knows the counts of the
whole step.

Lightning divides the loss of each batch by the number of batches, which gives a mean of means. For the mean over all
tokens, the number of tokens of the whole optimizer step has to be known before its first batch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.types import _Stateful

from bigmac_lightning.checkpoints.resuming import ResumableLoader, uncounted
from bigmac_lightning.contracts.batch import Batch


def counting(loader: Any, trainer: pl.Trainer, counts: Callable[[Batch], Sequence[float]]) -> "AccumulationLoader":
    """A loader that gives the training batches of `loader` with `Batch.step_counts`.

    Args:
        counts: gives what a batch's losses are divided by.
    """
    kind = _StatefulAccumulationLoader if isinstance(loader, _Stateful) else AccumulationLoader
    return kind(loader, trainer, counts)


def rewinding(loader: Any, trainer: pl.Trainer) -> Any:
    """A loader of any class whose state is that of `loader` at the last optimizer step; or `loader` itself if it has no
    state or goes back by itself."""
    foreign = isinstance(loader, _Stateful) and not isinstance(loader, ResumableLoader)
    return RewindingLoader(loader, trainer) if foreign else loader


class _Around:
    """Stands for a loader, and gives its batches."""

    def __init__(self, loader: Any, trainer: pl.Trainer) -> None:
        self.loader, self._trainer = loader, trainer
        self._before: dict[str, Any] | None = None  # the loader's state where the current optimizer step begins

    @property
    def sampler(self) -> Any:
        """The sampler whose `set_epoch` Lightning calls."""
        return getattr(self.loader, "sampler", None)

    @property
    def batch_sampler(self) -> Any:
        return getattr(self.loader, "batch_sampler", None)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return self._batches(iter(self.loader))  # at once, as other loaders use their state here

    def _batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        raise NotImplementedError

    def _given(self) -> int:
        """How many batches of the epoch were given: more than 0 where a run is resumed. Not before the first of them is
        asked for."""
        return self._trainer.fit_loop.epoch_loop.batch_progress.current.ready


class RewindingLoader(_Around):
    """Remembers the state of a loader at each optimizer step, where a step has several batches."""

    rewinds = True

    def __getattr__(self, name: str) -> Any:
        """What a user asks of the loader besides, such as its dataset."""
        if name.startswith("__") or name == "loader":  # of a copy that has none yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    def _batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        given = self._given()
        while True:
            size = self._trainer.accumulate_grad_batches
            if given % size == 0:
                self._before = dict(self.loader.state_dict()) if size > 1 else None
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch
            given += 1

    def state_dict(self) -> dict[str, Any]:
        return self._before if self._before is not None and uncounted(self._trainer) else self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)
        self._before = None


class AccumulationLoader(_Around):
    """Sets `Batch.step_counts` of each batch to the sum of the counts of all batches of its optimizer step."""

    def __init__(self, loader: Any, trainer: pl.Trainer, counts: Callable[[Batch], Sequence[float]]) -> None:
        super().__init__(loader, trainer)
        self._counts = counts
        self._state: dict[str, Any] | None = None  # of the loader after the batch that was given last

    def _batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        given = self._given()
        self._state = self._loader_state()
        while step := self._read(batches, given):
            self._before = self._state
            known = [self._counts(batch) for batch, _ in step if isinstance(batch, Batch)]  # others are refused later
            total = [sum(column) for column in zip(*known, strict=True)]
            for batch, self._state in step:
                yield batch.replace(step_counts=total) if isinstance(batch, Batch) else batch
            given += len(step)

    def _read(self, batches: Iterator[Any], given: int) -> list[tuple[Any, dict[str, Any] | None]]:
        """The next optimizer step's batches, each with the loader's state after it; fewer at the end of an epoch."""
        size = self._trainer.accumulate_grad_batches - given % self._trainer.accumulate_grad_batches
        limit = self._trainer.num_training_batches - given
        step: list[tuple[Any, dict[str, Any] | None]] = []
        while len(step) < min(size, limit):
            try:
                batch = next(batches)
            except StopIteration:
                break
            step.append((batch, self._loader_state()))
        return step

    def _loader_state(self) -> dict[str, Any] | None:
        return None


class _StatefulAccumulationLoader(AccumulationLoader):
    """Its state is that of the loader after the batches that were used, not after those that were read ahead."""

    rewinds = True

    def state_dict(self) -> dict[str, Any]:
        state = self._before if uncounted(self._trainer) else self._state
        return self.loader.state_dict() if state is None else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)
        self._before = self._state = None

    def _loader_state(self) -> dict[str, Any] | None:
        return dict(self.loader.state_dict())
