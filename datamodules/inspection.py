"""Shows what a `MultimodalDataModule` makes of its data, before a training. commands/data.py prints and draws it."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Literal

import numpy as np

from .example import Example, MediaPart, Size
from .loading.collate import Sample
from .media.modalities import modality_of
from .multimodal import MultimodalDataModule
from .packing.measuring import Measurements, encoded, measure_all, name_of
from .sources.source import Source
from .sources.stream import Stream, Taken
from .splits import Split

SURVEYED = 1000
"""Steps of which it is told how full their microbatches are."""

Kind = Literal["given", "learnt", "media", "target"]


@dataclass(frozen=True)
class SourceView:
    """A source and its measurements.

    Attributes:
        stream: whether the source has the first examples of a stream.
    """

    source: Source
    measured: Measurements
    stream: bool = False

    @property
    def usable(self) -> list[int]:
        """The numbers of the examples that can be used."""
        return self.measured.usable(np.arange(self.measured.number_usable)).tolist()

    def reasons(self) -> list[tuple[str, int]]:
        """The reasons why examples cannot be used, and for how many each, the most frequent first. Numbers in the texts
        are replaced by N, so that examples which are too long have one reason."""
        found: Counter[str] = Counter()
        for index, text in self.measured.errors.items():
            reason = text.removeprefix(name_of(self.source, index)).strip()
            reason = re.sub(r"^(\([^()]*\)\s*)+", "", reason)
            found[re.sub(r"\d+", "N", reason)] += 1
        return found.most_common()


@dataclass(frozen=True)
class Span:
    """A run of tokens of one kind, as text; for media and targets, their label and their number of tokens."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class ItemView:
    """An item of media of a sample, or its target.

    Attributes:
        label: what spans call it.
        rows: number of tokens that stand for it.
    """

    label: str
    item: MediaPart
    size: Size
    rows: int

    def pixels(self, most: int = 4) -> list[Any]:
        """The decoded pixels: an image, or `most` evenly spaced frames of a video; each (C, H, W), uint8. There are
        none of modalities without a view.

        Raises:
            ExampleError: the file is broken.
        """
        view = modality_of(self.item).view
        return [] if view is None else list(view(self.item, self.size, most))


@dataclass(frozen=True)
class SampleView:
    """A sample as the model will see it."""

    name: str
    spans: Sequence[Span]
    tokens: int
    learnt: int
    items: Sequence[ItemView]


@dataclass(frozen=True)
class MicrobatchView:
    """Numbers of samples, tokens, learnt tokens and media rows of a microbatch, and the encoders' cost."""

    samples: int
    tokens: int
    learnt: int
    rows: int
    cost: float


@dataclass(frozen=True)
class StepView:
    """The first step of the first replica.

    Attributes:
        steps: number of steps of an epoch.
        used: share of the token budget that the samples of the first steps use; padding does not count.
        microbatches: in any order.
    """

    steps: int
    used: float
    microbatches: Sequence[MicrobatchView]


def sources_of(data: MultimodalDataModule, split: Split, stream_examples: int = 200) -> list[SourceView]:
    """Measure all sources of a split.

    Args:
        stream_examples: number of examples that are read of each stream.
    """
    views: list[SourceView] = []
    for given in data.split_sources(split):
        source = Taken(given, stream_examples) if isinstance(given, Stream) else given
        if source is given:
            measured = data.measure(source, split)
        else:
            measured = measure_all(source, data.encoder, data.token_budget, data.num_workers, learns=split == "train")
        views.append(SourceView(source, measured, source is not given))
    return views


def evenly_chosen(views: Sequence[SourceView], samples: int) -> list[tuple[SourceView, int]]:
    """Examples to show: equally many of each source as far as possible, evenly spaced among the usable ones."""
    usable = [view.usable for view in views]
    wanted = [0] * len(views)
    while sum(wanted) < min(samples, sum(map(len, usable))):
        wanted[min((n, k) for k, n in enumerate(wanted) if n < len(usable[k]))[1]] += 1
    return [
        (view, numbers[place])
        for view, numbers, n in zip(views, usable, wanted, strict=True)
        for place in np.linspace(0, len(numbers) - 1, n).astype(int).tolist()
    ]


def sample_of(data: MultimodalDataModule, view: SourceView, index: int, split: Split) -> SampleView:
    """The view of an example as it is encoded for training, without augmentation."""
    example = view.source[index]
    name = name_of(view.source, index, example)
    learns, limits = split == "train", view.source.limits
    sample, sizes = encoded(example, data.encoder, data.token_budget, name, learns=learns, limits=limits)
    items = _items(example, sample, sizes)
    spans = list(_spans(sample, items, data.encoder.tokenizer))
    return SampleView(name, spans, len(sample.tokens), sum(sample.labelled), items)


def _items(example: Example, sample: Sample, sizes: Sequence[Size]) -> list[ItemView]:
    """The views of the items, in the order of the text, then of the target."""
    left = list(zip(example.media, sizes, strict=False))
    counts: Counter[str] = Counter()
    views: list[ItemView] = []
    for media in sample.media[: len(example.media)]:
        at = next(i for i, (item, _) in enumerate(left) if item.file.name == media.name)
        item, size = left.pop(at)
        kind = modality_of(item).name
        counts[kind] += 1
        views.append(ItemView(f"{kind} {counts[kind]}", item, size, media.tokens))
    if example.target is not None:
        views.append(ItemView("target", example.target, sizes[-1], sample.targets[0].rows))
    return views


def _spans(sample: Sample, items: Sequence[ItemView], tokenizer: Any) -> Iterator[Span]:
    """The spans of a sample. A run is decoded with all tokens before it: a character may have several tokens."""
    item_of: dict[int, int] = {}
    indices_of = [media.indices for media in sample.media[: len(items) - len(sample.targets)]]
    indices_of += [range(target.start, target.start + target.rows) for target in sample.targets]
    for number, indices in enumerate(indices_of):
        item_of |= dict.fromkeys(indices, number)

    def kind_of(index: int) -> tuple[Kind, int]:
        if index in item_of:
            return ("target" if items[item_of[index]].label == "target" else "media"), item_of[index]
        return ("learnt" if sample.labelled[index] else "given"), -1

    before = ""
    for (kind, number), run in groupby(range(len(sample.tokens)), kind_of):
        indices = list(run)
        whole = tokenizer.decode(
            sample.tokens[: indices[-1] + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if number >= 0:
            yield Span(kind, f"{items[number].label}: {len(indices)} tokens")
        else:
            yield Span(kind, whole[len(before) :])
        before = whole


def first_step(
    data: MultimodalDataModule,
    views: Sequence[SourceView],
    split: Split,
    microbatches: int | None = None,
    replicas: int = 1,
) -> StepView | None:
    """The first step; ``None``: there is no usable example, or a source is a stream, which is packed while it is read.

    Args:
        microbatches: number of microbatches of a step, as the strategy sets it; ``None``: the DataModule's.
        replicas: number of data-parallel replicas.
    """
    if any(view.stream for view in views) or not views or not all(view.usable for view in views):
        return None
    measured = [view.measured for view in views]
    sampler = data.sampler(split, measured, microbatches, {"num_replicas": replicas, "rank": 0})
    first, used, bins = None, 0, 0
    for step in islice(sampler, SURVEYED):
        first = first or step
        used += sum(int(measured[source].tokens[i]) for b in step.bins for source, i in b)
        bins += len(step.bins)
    assert first is not None
    made: list[MicrobatchView] = []
    for b in first.bins:
        sums = {
            name: sum(float(measured[s].arrays[name][i]) for s, i in b)
            for name in ("tokens", "learnt", "rows", "encoder")
        }
        made.append(
            MicrobatchView(len(b), int(sums["tokens"]), int(sums["learnt"]), int(sums["rows"]), sums["encoder"])
        )
    return StepView(len(sampler), used / (bins * data.token_budget), made)
