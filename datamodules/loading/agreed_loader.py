"""What the loaders of sources and of streams share: a DataLoader whose batches all ranks have agreed on, one ahead."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from bigmac_lightning.checkpoints.resuming import ResumableLoader
from bigmac_lightning.contracts.batch import Batch

from ..packing.steps import StepSampler
from .failures import Agreement
from .flat_batch import FlatBatch, FlatCollate

Position = dict[str, Any]
"""A position in a part of a mixture of streams, as checkpoints hold it:

- "streams": for each stream its "name", its "repeat", its "place" and "drawn", how many of its examples have been
  drawn, all at the start of a buffer;
- "buffer": the number of that buffer;
- "step": how many steps of that buffer have been yielded.
"""


@dataclass(frozen=True)
class Progress:
    """What a batch of streams says about the reading of its streams.

    Attributes:
        part: the number of the part of the streams that the batch is of.
        position: where reading of the part continues after this batch.
        left_out: the reasons why examples of the buffer were left out, if this batch is the buffer's first.
        checksum: equal on all ranks if they have read the same examples.
    """

    part: int
    position: Position
    left_out: tuple[str, ...] = ()
    checksum: int = 0

    def __str__(self) -> str:
        left_out = "".join(f"; left out: {text}" for text in self.left_out)
        drawn = ", ".join(f"{stream['drawn']} of {stream['name']}" for stream in self.position["streams"])
        where = f"part {self.part} buffer {self.position['buffer']} step {self.position['step']}"
        return f"up to {where}, drawn {drawn}, checksum {self.checksum:x}{left_out}"


def agreed(batches: Iterable[Any], agreement: Agreement) -> Iterator[Batch]:
    """Batches that all ranks have agreed on.

    The ranks exchange the failures of batch n + 1 while step n runs, so that no step waits for the exchange: an
    exchange is started when the worker delivers the batch, and completed when the step before has been made.

    Args:
        batches: from workers; `FlatBatch`es or batches.
    """

    def started() -> Iterator[Callable[[], Batch]]:
        for given in batches:
            batch = given.restore() if isinstance(given, FlatBatch) else given
            progress = batch.progress if isinstance(batch, Batch) else None
            if isinstance(progress, Progress):
                yield agreement.start(batch, progress.checksum, str(progress))
            else:
                yield agreement.start(batch, 0, "no batch of a stream")

    exchanges = started()
    complete = next(exchanges, None)
    while complete is not None:
        batch = complete()
        complete = next(exchanges, None)
        yield batch


class AgreedLoader(ResumableLoader):
    """A loader whose batches all ranks have agreed on.

    It holds a DataLoader and is none itself, since Lightning rebuilds DataLoaders in prediction and to overfit. It has
    what Lightning and the strategy expect of a DataLoader: the strategy may replace `collate_fn` and `worker_init_fn`,
    and Lightning sets the epoch of `sampler`.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: StepSampler | None,
        collate_fn: Callable[[Any], Any],
        agreement: Agreement,
        num_workers: int,
        prefetch: int,
        uncounted: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(uncounted)
        self.agreement = agreement
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            collate_fn=FlatCollate(collate_fn),
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            # workers that persist have a copy of the dataset, and would not see that a stream starts elsewhere
            persistent_workers=num_workers > 0 and sampler is not None,
            pin_memory=torch.cuda.is_available(),
        )
        self.batch_sampler = None  # as in a DataLoader whose sampler yields whole batches

    @property
    def collate_fn(self) -> Any:
        """Makes a batch of an item of the dataset, in the worker."""
        assert isinstance(self._loader.collate_fn, FlatCollate)
        return self._loader.collate_fn.collate

    @collate_fn.setter
    def collate_fn(self, function: Any) -> None:
        self._loader.collate_fn = FlatCollate(function)

    @property
    def _iterator(self) -> Any:
        """Lightning ends the workers of a finished run by this name, and sets it to ``None``."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._loader._iterator = iterator

    @property
    def worker_init_fn(self) -> Any:
        """The function that each worker calls when it starts."""
        return self._loader.worker_init_fn

    @worker_init_fn.setter
    def worker_init_fn(self, function: Any) -> None:
        self._loader.worker_init_fn = function
