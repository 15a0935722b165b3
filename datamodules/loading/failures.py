"""How all ranks come to know which examples turned out to be broken when their owners decoded them.

A media item is decoded by its owner alone, but all ranks must leave out the same samples, or end together. So the ranks
exchange what failed in each batch before its first forward: one small collective per batch, on the CPU.

The exchange has two phases, so that it takes place while the step before runs: `Agreement.start` sends what failed on
this rank and returns at once; calling what it returned waits for the other ranks. All ranks must call both for the same
batches in the same order, whatever has failed. That is why an error that ends the run travels as a value
(`SourceError` in place of a batch) until all ranks know it.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.ranks import Ranks

from ..errors import ExampleError, SourceError

OnError = Literal["raise", "skip"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """A sample that cannot be used.

    Attributes:
        replica: the data-parallel replica in whose batch it is.
        microbatch, origin: the numbers of its microbatch in that batch, and of its origin in the microbatch.
        message: names the source, the sample and the file, and says what is wrong.
    """

    replica: int
    microbatch: int
    origin: int
    message: str


class Agreement:
    """Lets all ranks leave out the same samples, or end together.

    Args:
        ranks: all processes of the run.
        replica: the data-parallel replica of this process.
        on_error: "raise" or "skip", as for `MultimodalDataModule`.
        report: is called on every rank with `skipped` whenever that has grown.

    Attributes:
        skipped: number of samples left out so far, over all replicas.
    """

    def __init__(
        self, ranks: Ranks, replica: int, on_error: OnError, report: Callable[[int], None] | None = None
    ) -> None:
        self.ranks, self.replica, self.on_error, self.report = ranks, replica, on_error, report
        self.skipped = 0

    def start(self, batch: Batch | SourceError, checksum: int = 0, read: str = "") -> Callable[[], Batch]:
        """Send what failed of a batch to the other ranks, without waiting for them. Collective.

        Args:
            checksum: a number that is equal on all ranks if they have read the same examples.
            read: a description of what this rank has read, for the error that is raised if the checksums differ.

        Returns: a function that waits for the other ranks, and returns the batch without the samples that failed on any
        rank. It is collective, too, and must be called before the exchange of the next batch is started. It raises

        - ExampleError, on every rank, if a sample failed on any rank and `on_error` is "raise";
        - SourceError, on every rank, if a rank could not make its batch, or the ranks have read different examples.
        """
        own: list[Failure] | str = str(batch) if isinstance(batch, SourceError) else failures(batch, self.replica)
        wait = self.ranks.exchange(own, checksum)
        return lambda: self._complete(batch, read, *wait())

    def _complete(
        self, batch: Batch | SourceError, read: str, everyone: list[list[Failure] | str], same: bool
    ) -> Batch:
        """
        Args:
            everyone: for each rank its failures, or the text of its `SourceError`.
            same: whether the checksums of all ranks are equal.
        """
        if errors := [text for text in everyone if isinstance(text, str)]:
            raise SourceError("; ".join(dict.fromkeys(errors)))
        if not same:
            readings = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(self.ranks.gather(read)))
            raise SourceError(
                "the ranks have read different examples from the streams. Each rank must read all examples, in the "
                "same order: do not split a stream by rank, node or worker, and let its order depend only on the "
                f"number of the repeat ({readings})"
            )
        assert isinstance(batch, Batch)
        failed = [failure for some in everyone if not isinstance(some, str) for failure in some]
        if not failed:
            return batch
        samples = {(f.replica, f.microbatch, f.origin): f for f in failed}
        self.leave_out([f.message for f in samples.values()])
        return self._without(batch, [key[1:] for key in samples if key[0] == self.replica])

    def leave_out(self, messages: Sequence[str]) -> None:
        """Count and report broken samples that every rank knows of.

        Raises:
            ExampleError: there are any, and `on_error` is "raise".
        """
        if not messages:
            return
        text = "\n".join(messages)
        if self.on_error == "raise":
            raise ExampleError(f'{text}\n(on_error="skip" goes on without such samples)')
        self.skipped += len(messages)
        if self.ranks.rank == 0:
            log.warning("skipped %d broken samples so far; now:\n%s", self.skipped, text)
        if self.report is not None:
            self.report(self.skipped)

    @staticmethod
    def _without(batch: Batch, samples: list[tuple[int, int]]) -> Batch:
        """The batch without the samples at these (microbatch, origin) pairs."""
        if not samples:
            return batch
        origins: dict[int, set[int]] = {}
        for m, origin in samples:
            origins.setdefault(m, set()).add(origin)
        microbatches = [mb.without(origins[m]) if m in origins else mb for m, mb in enumerate(batch.microbatches)]
        return batch.replace(microbatches=microbatches, planned=None)


def failures(batch: Batch, replica: int) -> list[Failure]:
    """The failures among the items that this process owns."""
    found: list[Failure] = []
    for m, microbatch in enumerate(batch.microbatches):
        for item in (*microbatch.media, *microbatch.targets):
            if item.error is not None:
                name = microbatch.origins[item.origin].name
                found.append(Failure(replica, m, item.origin, f"{name}: {item.error}"))
    return found
