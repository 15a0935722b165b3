"""The loader of streams: an endless row of steps, cut into epochs of a given length."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bigmac_lightning.contracts.batch import Batch

from ..errors import SourceError
from .agreed_loader import AgreedLoader, Progress, agreed
from .failures import Agreement
from .source_loader import StepCollate
from .stream_steps import StreamStep, StreamSteps

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamCollate:
    """Makes the `Batch` of a `StreamStep`, with the data of the items that this process owns."""

    collate: StepCollate

    def __call__(self, step: StreamStep | SourceError) -> Batch | SourceError:
        if isinstance(step, SourceError):
            return step
        batch = self.collate(step.microbatches)
        return batch.replace(progress=step.progress) if isinstance(batch, Batch) else batch


class StreamLoader(AgreedLoader):
    """Batches of streams that all ranks have agreed on, starting at any position.

    Its length is the given number of steps of an epoch; the next epoch continues where the last one stopped.

    Attributes:
        same: whether every epoch repeats the first one.
        position: where reading continues: "parts", the `Position` in each part of the streams, and "next", the number
            of the part that the next step comes from.
    """

    def __init__(
        self,
        stream_steps: StreamSteps,
        collate_fn: StreamCollate,
        agreement: Agreement,
        num_workers: int,
        prefetch: int,
        steps: int,
        uncounted: Callable[[], int] | None = None,
        same: bool = False,
    ) -> None:
        super().__init__(stream_steps, None, collate_fn, agreement, num_workers, prefetch, uncounted)
        # by another name than `dataset`: Lightning warns of an IterableDataset that has a length
        self.stream_steps, self.steps, self.same = stream_steps, steps, same
        self.epoch = 0
        self._batches: Iterator[Batch] | None = None
        self.position: dict[str, Any]
        position = {"parts": stream_steps.positions, "next": 0}
        self._start = {"epoch": 0, "step": 0, "skipped": 0, "position": position}
        self.stands = [self._start]

    @property
    def sampler(self) -> "StreamLoader":
        """Lightning calls `set_epoch` of a loader's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def _iterator(self) -> Any:
        return self._batches

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._batches = iterator  # the workers end when the iterator before is freed

    def follow(self, other: "StreamLoader") -> None:
        """Continue after the last epoch of another loader."""
        self.stands = [other.stands[-1]]
        self.agreement.skipped = other.agreement.skipped

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        stand, epoch = self.stands[-1], self.epoch
        step = stand["step"] if self.resumes and stand["epoch"] == epoch else 0
        if self.resumes or self.same or self._batches is None:
            self.position = self._start["position"] if self.same and not step else stand["position"]
            self.stream_steps.positions, self.stream_steps.first = self.position["parts"], self.position["next"]
            self._batches = agreed(self._loader, self.agreement)
        self.resumes = False
        while step < self.steps:
            batch = next(self._batches)
            progress = batch.progress
            assert isinstance(progress, Progress)
            self.agreement.leave_out(progress.left_out)
            step += 1
            skipped, parts = self.agreement.skipped, [*self.position["parts"]]
            parts[progress.part] = progress.position
            self.position = {"parts": parts, "next": (progress.part + 1) % len(parts)}
            self.reach({"epoch": epoch, "step": step, "skipped": skipped, "position": self.position})
            yield batch

    def describe(self) -> dict[str, Any]:
        return {"steps": self.steps, "order": self.stream_steps.fingerprint()}

    def stand_of(self, state: dict[str, Any]) -> dict[str, Any]:
        """Where to continue: with other settings or another number of replicas, at the start of the saved buffer.

        Raises:
            ValueError: the run was saved while it read other streams, or other parts of them.
        """
        parts = state["position"]["parts"]
        if len(parts) != len(self.stream_steps.positions):
            raise ValueError(
                f"the run was saved with mixture.stream_parts={len(parts)}, and now has "
                f"{len(self.stream_steps.positions)}: the places of its parts are not known. Restore it, or start from "
                "the weights alone"
            )
        now = [stream.name for stream in self.stream_steps.streams]
        saved = [stream["name"] for stream in parts[0]["streams"]]
        if saved != now:
            raise ValueError(
                f"the run was saved while it read {saved}, and now it reads {now}: their places are not known. Restore "
                "the sources, or start from the weights alone"
            )
        again = sum(part["step"] for part in parts)
        if again and state["order"] != self.stream_steps.fingerprint():
            log.warning(
                "data_parallel_size, token_budget, microbatches, packing, mixture.weights or seed differ from those of "
                "the saved run: the streams continue at the start of their buffer, of which %d steps come once more",
                again,
            )
            parts = [{**part, "step": 0} for part in parts]
        self.agreement.skipped = state["skipped"]
        position = {"parts": parts, "next": state["position"]["next"]}
        return {**{name: state[name] for name in ("epoch", "step", "skipped")}, "position": position}
