"""The DataLoader of `MultimodalDataModule`: workers encode, pack and decode; the main process checks, counts, resumes.

Knows sources, encoders and batches; knows nothing of Lightning but its protocol for stateful loaders.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from bigmac_lightning.checkpoints.resuming import ResumableLoader
from bigmac_lightning.contracts.batch import Batch, PipelineLayout

from ..encoding.chat import ChatEncoder
from ..packing.measuring import Measurements, name_of
from ..packing.steps import Step, StepSampler
from ..sources.source import Source
from .collate import Sample, make_batch
from .failures import Agreement, SourceError
from .parcel import Parcel, ParcelCollate


def dearest_first(parts: Sequence[list[Sample]]) -> list[list[Sample]]:
    """The microbatches of a step by their dearest media item, then by their dearest target.

    Items of one kind are then encoded in the same groups, where they can be shared out evenly: a single dear item among
    cheap ones keeps its owner busy while all others wait. Spreading the dear ones evenly over the groups is slower than
    leaving the order to chance (benchmarks/uneven_data.py).
    """

    def dearest(part: list[Sample]) -> tuple[float, float]:
        media = (item.cost for sample in part for item in sample.media)
        targets = (item.cost for sample in part for item in sample.targets)
        return max(media, default=0.0), max(targets, default=0.0)

    return sorted(parts, key=dearest, reverse=True)


class EncodedSteps(Dataset):
    """The samples of a `Step`, microbatch by microbatch, before anything is decoded.

    Args:
        augment: whether media are augmented.
        ordered: whether microbatches stay in the order of the step; else `dearest_first`.
        sampling: whether targets are to be made, so that none is to be loaded.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        measured: Sequence[Measurements],
        encoder: ChatEncoder,
        augment: bool,
        ordered: bool,
        sampling: bool,
    ) -> None:
        self.sources, self.measured, self.encoder = sources, measured, encoder
        self.augment, self.ordered, self.sampling = augment, ordered, sampling

    def __getitem__(self, step: Step) -> list[list[Sample]] | SourceError:
        try:
            parts = [[self._sample(step.epoch, *pick) for pick in picks] for picks in step.bins]
            return parts if self.ordered else dearest_first(parts)
        except SourceError as broken:  # told to all ranks before it is raised
            return broken

    def _sample(self, epoch: int, source: int, index: int) -> Sample:
        name = name_of(self.sources[source], index)
        measured = self.measured[source]
        try:
            example = self.sources[source][index]
            name = name_of(self.sources[source], index, example)
            draw = (epoch, source, index) if self.augment else None
            sample = self.encoder.encode(example, measured.sizes(index), name, draw)
        except Exception as error:
            raise SourceError(f"{name} could be read when it was measured, and now: {error}") from error
        if len(sample.tokens) != measured.tokens[index]:
            raise SourceError(
                f"{name} has {len(sample.tokens)} tokens, but {measured.tokens[index]} when it was measured: its "
                "source has changed, or does not give the same example each time"
            )
        if self.sampling:
            return replace(sample, targets=[replace(target, load=None) for target in sample.targets])
        return sample


@dataclass(frozen=True)
class StepCollate:
    """From the samples of a step to its `Batch`, with the data of the items that this process owns."""

    layout: PipelineLayout
    packed: bool
    padding: int
    attention_tokens: float | None = None

    def __call__(self, parts: list[list[Sample]] | SourceError) -> Batch | SourceError:
        if isinstance(parts, SourceError):
            return parts
        return make_batch(parts, self.layout, self.padding, self.packed, _text, self.attention_tokens)


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


Position = dict[str, Any]
"""{"streams": of each its name, its turn, its place and how many examples of it were drawn, all at the start of a
window; "window": its number; "step": steps of it that have been given}"""


@dataclass(frozen=True)
class Progress:
    """What comes with a batch of streams.

    Attributes:
        position: where to go on behind it.
        left_out: what was wrong with examples of the window that begins with it.
        check: the same number on all ranks, if they have read the same.
    """

    position: Position
    left_out: tuple[str, ...] = ()
    check: int = 0

    def __str__(self) -> str:
        ahead = "".join(f"; left out: {text}" for text in self.left_out)
        drawn = ", ".join(f"{stream['drawn']} of {stream['name']}" for stream in self.position["streams"])
        where = f"window {self.position['window']} step {self.position['step']}"
        return f"up to {where}, drawn {drawn}, checksum {self.check:x}{ahead}"


def agreed(made: Iterable[Any], agreement: Agreement) -> Iterator[Batch]:
    """Batches that all ranks have agreed on, one ahead: while a step runs, the ranks tell each other of the next one.

    Args:
        made: by workers; `Parcel`s or what is in them.
    """

    def told() -> Iterator[Callable[[], Batch]]:
        for given in made:
            batch = given.open() if isinstance(given, Parcel) else given
            progress = batch.progress if isinstance(batch, Batch) else None
            known = isinstance(progress, Progress)
            yield agreement(batch, progress.check if known else 0, str(progress) if known else "no batch of a stream")

    outcomes = told()
    ahead = next(outcomes, None)
    while ahead is not None:
        batch = ahead()
        ahead = next(outcomes, None)
        yield batch


class AgreedLoader(ResumableLoader):
    """What the loaders of sources and of streams share.

    Around a DataLoader and none itself: in prediction, and to overfit, Lightning would rebuild one. The strategy may
    replace `collate_fn` and `worker_init_fn`; Lightning tells the epoch to `sampler`.
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
            collate_fn=ParcelCollate(collate_fn),
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            persistent_workers=num_workers > 0 and sampler is not None,  # they would not hear of another position
            pin_memory=torch.cuda.is_available(),
        )
        self.batch_sampler = None  # as of a DataLoader whose sampler gives whole batches

    @property
    def collate_fn(self) -> Any:
        """Makes a batch of what the dataset gives, in the worker."""
        assert isinstance(self._loader.collate_fn, ParcelCollate)
        return self._loader.collate_fn.collate

    @collate_fn.setter
    def collate_fn(self, function: Any) -> None:
        self._loader.collate_fn = ParcelCollate(function)

    @property
    def _iterator(self) -> Any:
        """By this name Lightning ends the workers when a run is over, and drops it."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._loader._iterator = iterator

    @property
    def worker_init_fn(self) -> Any:
        """Called in each worker as it starts."""
        return self._loader.worker_init_fn

    @worker_init_fn.setter
    def worker_init_fn(self, function: Any) -> None:
        self._loader.worker_init_fn = function


class StepLoader(AgreedLoader):
    """Batches that all ranks have agreed on, from any step on."""

    def __init__(
        self,
        encoded: EncodedSteps,
        sampler: StepSampler,
        collate_fn: StepCollate,
        agreement: Agreement,
        num_workers: int,
        prefetch: int,
        uncounted: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(encoded, sampler, collate_fn, agreement, num_workers, prefetch, uncounted)
        self.encoded, self.sampler = encoded, sampler
        self.stands = [{"epoch": 0, "step": 0, "skipped": 0}]

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        stand, epoch = self.stands[-1], self.sampler.epoch
        given = stand["step"] if self.resumes and stand["epoch"] == epoch else 0
        self.resumes, self.sampler.start = False, given
        for batch in agreed(self._loader, self.agreement):
            given += 1
            self.reach({"epoch": epoch, "step": given, "skipped": self.agreement.skipped})
            yield batch

    def describe(self) -> dict[str, Any]:
        return {
            "steps": len(self.sampler),
            "replicas": self.sampler.num_replicas,
            "order": self.sampler.fingerprint(),
        }

    def stand_of(self, state: dict[str, Any]) -> dict[str, Any]:
        within = 0 < state["step"] < state["steps"]
        if within and state["order"] != self.sampler.fingerprint():
            raise ValueError(
                "the run was saved in the middle of an epoch over other data: sources, their weights, the tokenizer, "
                "token_budget, microbatches, window or seed have changed, so the rest of the epoch is not known. "
                "Restore them, or start from the weights alone"
            )
        if within and state["replicas"] != self.sampler.num_replicas:
            raise ValueError(
                f"the run was saved in the middle of an epoch with data_parallel_size={state['replicas']}; with "
                f"{self.sampler.num_replicas} the steps of the epoch are others. Resume with {state['replicas']} (the "
                "number of pipeline ranks may change), or from a checkpoint of the end of an epoch"
            )
        self.agreement.skipped = state["skipped"]
        return {"epoch": state["epoch"], "step": state["step"] if within else 0, "skipped": state["skipped"]}
