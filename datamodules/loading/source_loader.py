"""The loader of sources: workers encode, pack and decode the steps that a sampler yields."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from bigmac_lightning.contracts.batch import Batch, PipelineLayout

from ..encoding.chat import ChatEncoder
from ..errors import SourceError, reason_of
from ..packing.measuring import Measurements, name_of
from ..packing.steps import Step, StepSampler
from ..sources.source import Source
from .agreed_loader import AgreedLoader, agreed
from .collate import Sample, make_batch
from .failures import Agreement


def costliest_first(microbatches: Sequence[list[Sample]]) -> list[list[Sample]]:
    """The microbatches of a step, sorted by the cost of their costliest media item, then of their costliest target.

    Costly items are then encoded in the same groups, in which all ranks can share them evenly. A single costly item
    among cheap ones keeps its owner busy while all other ranks wait. Spreading costly items evenly over the groups is
    slower than a random order (benchmarks/uneven_data.py).
    """

    def costliest(samples: list[Sample]) -> tuple[float, float]:
        media = (item.cost for sample in samples for item in sample.media)
        targets = (item.cost for sample in samples for item in sample.targets)
        return max(media, default=0.0), max(targets, default=0.0)

    return sorted(microbatches, key=costliest, reverse=True)


class EncodedSteps(Dataset):
    """A dataset that is indexed by a `Step`: its samples, by microbatch, before anything is decoded.

    Args:
        augment: whether media are augmented.
        ordered: whether microbatches keep the order of the step; otherwise the order is that of `costliest_first`.
        sampling: whether generators make the targets, so that none is loaded.
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
        """The samples; or the error, which all ranks must know before any rank raises it."""
        try:
            microbatches = [[self._sample(step.epoch, *pick) for pick in picks] for picks in step.bins]
            return microbatches if self.ordered else costliest_first(microbatches)
        except SourceError as error:
            return error

    def _sample(self, epoch: int, source: int, index: int) -> Sample:
        name = name_of(self.sources[source], index)
        measured = self.measured[source]
        try:
            example = self.sources[source][index]
            name = name_of(self.sources[source], index, example)
            draw = (epoch, source, index) if self.augment else None
            sample = self.encoder.encode(example, measured.sizes(index), name, draw)
        except Exception as error:
            raise SourceError(f"{name} could be read when it was measured, and now: {reason_of(error)}") from error
        if len(sample.tokens) != measured.tokens[index]:
            raise SourceError(
                f"{name} has {len(sample.tokens)} tokens, but {measured.tokens[index]} when it was measured: its "
                "source has changed, or does not give the same example each time"
            )
        return sample.to_draw() if self.sampling else sample


@dataclass(frozen=True)
class StepCollate:
    """Makes a `Batch` of the samples of a step, with the data of the items that this process owns.

    Attributes:
        layout: this process's place in its pipeline.
        packed, padding, attention_tokens: see `make_batch`.
    """

    layout: PipelineLayout
    packed: bool
    padding: int
    attention_tokens: float | None = None

    def __call__(self, microbatches: list[list[Sample]] | SourceError) -> Batch | SourceError:
        if isinstance(microbatches, SourceError):
            return microbatches
        return make_batch(microbatches, self.layout, self.padding, self.packed, reason_of, self.attention_tokens)


class StepLoader(AgreedLoader):
    """Batches of sources that all ranks have agreed on, starting at any step of an epoch."""

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
        step = stand["step"] if self.resumes and stand["epoch"] == epoch else 0
        self.resumes, self.sampler.start = False, step
        for batch in agreed(self._loader, self.agreement):
            step += 1
            self.reach({"epoch": epoch, "step": step, "skipped": self.agreement.skipped})
            yield batch

    def describe(self) -> dict[str, Any]:
        return {
            "steps": len(self.sampler),
            "replicas": self.sampler.num_replicas,
            "order": self.sampler.fingerprint(),
        }

    def stand_of(self, state: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            ValueError: the run was saved within an epoch, the rest of which this loader would not yield.
        """
        within_epoch = 0 < state["step"] < state["steps"]
        if within_epoch and state["order"] != self.sampler.fingerprint():
            raise ValueError(
                "the run was saved in the middle of an epoch over other data: sources, mixture.weights, the tokenizer, "
                "token_budget, microbatches, packing or seed have changed, so the rest of the epoch is not known. "
                "Restore them, or start from the weights alone"
            )
        if within_epoch and state["replicas"] != self.sampler.num_replicas:
            raise ValueError(
                f"the run was saved in the middle of an epoch with data_parallel_size={state['replicas']}; with "
                f"{self.sampler.num_replicas} the epoch has other steps. Resume with {state['replicas']} (the number "
                "of pipeline ranks may change), or from a checkpoint of the end of an epoch"
            )
        self.agreement.skipped = state["skipped"]
        return {"epoch": state["epoch"], "step": state["step"] if within_epoch else 0, "skipped": state["skipped"]}
