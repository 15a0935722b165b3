"""What becomes of examples that turn out to be broken when their owner decodes them.

All ranks hear of them before the first forward, and all do the same: end the run, or go on without these samples. One
small collective per batch, on the CPU.
Knows batches; knows nothing of plans or models.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.ranks import Ranks

from ..example import ExampleError

OnError = Literal["raise", "skip"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """A sample that cannot be used.

    Attributes:
        replica: data-parallel replica whose batch it is in.
        microbatch, origin: where it is in that batch.
        message: names source, sample and file, and says what is wrong.
    """

    replica: int
    microbatch: int
    origin: int
    message: str


class SourceError(RuntimeError):
    """An example could be read when it was measured, and cannot be read now, or is another: no way to go on."""


class Agreement:
    """The ranks' common knowledge of what failed.

    Args:
        ranks: all processes.
        replica: of this process.
        on_error: what to do.
        report: called on every rank with `skipped`, when that has grown.

    Attributes:
        skipped: samples left out so far, over all replicas.
    """

    def __init__(
        self, ranks: Ranks, replica: int, on_error: OnError, report: Callable[[int], None] | None = None
    ) -> None:
        self.ranks, self.replica, self.on_error, self.report = ranks, replica, on_error, report
        self.skipped = 0

    def __call__(self, batch: Batch | SourceError, check: int = 0, read: str = "") -> Callable[[], Batch]:
        """Tell the other ranks what failed of a batch, and do not wait for them. Collective.

        Args:
            check: a number that is the same on all ranks, if they have read the same.
            read: what this rank has read, for the error that says so.

        Returns: waits for them, and gives the batch without samples that failed on any rank. Collective; to be called
        before the next batch is told of.

        Raises (what is returned does):
            ExampleError: on every rank, if something failed on any and `on_error` is "raise".
            SourceError: on every rank, if a rank could not make its batch, or they have read different examples.
        """
        own: list[Failure] | str = str(batch) if isinstance(batch, SourceError) else failures(batch, self.replica)
        told = self.ranks.tell(own, check)
        return lambda: self._agree(batch, read, *told())

    def _agree(self, batch: Batch | SourceError, read: str, everyone: list[list[Failure] | str], same: bool) -> Batch:
        if broken := [text for text in everyone if isinstance(text, str)]:
            raise SourceError("; ".join(dict.fromkeys(broken)))
        if not same:
            readings = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(self.ranks.gather(read)))
            raise SourceError(
                "the ranks have read different examples from the streams: each must read all of them, in one order: "
                "do not split a stream by rank, node or worker, and let its order depend on the turn alone "
                f"({readings})"
            )
        assert isinstance(batch, Batch)
        failed = [failure for some in everyone if not isinstance(some, str) for failure in some]
        if not failed:
            return batch
        samples = {(f.replica, f.microbatch, f.origin): f for f in failed}
        self.leave_out([f.message for f in samples.values()])
        return self._without(batch, [key[1:] for key in samples if key[0] == self.replica])

    def leave_out(self, messages: Sequence[str]) -> None:
        """Do what is to be done about broken samples that every rank knows of.

        Raises:
            ExampleError: `on_error` is "raise", and there are any.
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
        if not samples:
            return batch
        gone: dict[int, set[int]] = {}
        for m, origin in samples:
            gone.setdefault(m, set()).add(origin)
        microbatches = [mb.without(gone[m]) if m in gone else mb for m, mb in enumerate(batch.microbatches)]
        return batch.replace(microbatches=microbatches, planned=None)


def failures(batch: Batch, replica: int) -> list[Failure]:
    """Of this process's own items."""
    found: list[Failure] = []
    for m, microbatch in enumerate(batch.microbatches):
        for item in (*microbatch.media, *microbatch.targets):
            if item.error is not None:
                name = microbatch.origins[item.origin].name
                found.append(Failure(replica, m, item.origin, f"{name}: {item.error}"))
    return found
