"""What a `MultimodalDataModule` makes of its data, for people who want to look at it before they train.

Knows sources, measurements and samples; prints and draws nothing.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from .example import Example, Image, Size, Video
from .loading.collate import Sample
from .media.decoding import read_frames, read_image
from .multimodal import MultimodalDataModule, Split
from .packing.measuring import Measurements, encoded, measure_all, name_of
from .sources.source import Source
from .sources.stream import Stream, Taken

Kind = Literal["given", "learnt", "media", "target"]


@dataclass(frozen=True)
class SourceView:
    """A source, and what was measured of it.

    Attributes:
        stream: whether these are the first examples of a stream.
    """

    source: Source
    measured: Measurements
    stream: bool = False

    @property
    def usable(self) -> list[int]:
        """Numbers of the examples that can be used."""
        return np.flatnonzero(self.measured.tokens).tolist()

    def reasons(self) -> list[tuple[str, int]]:
        """Why others cannot be used, numbers left out, and how many for each reason; the most frequent first."""
        found: Counter[str] = Counter()
        for index, text in self.measured.errors.items():
            reason = text.removeprefix(name_of(self.source, index)).strip()
            reason = re.sub(r"^(\([^()]*\)\s*)+", "", reason)
            found[re.sub(r"\d+", "N", reason)] += 1
        return found.most_common()


@dataclass(frozen=True)
class Span:
    """A run of tokens of one kind, as text; of media and targets, what they are."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class ItemView:
    """An image or video of a sample, or its target.

    Attributes:
        label: what spans call it.
        rows: tokens that stand for it.
        frames: of a video that are used; empty: it is up to the processor.
    """

    label: str
    item: Image | Video
    size: Size
    rows: int

    def pixels(self, most: int = 4) -> list[Any]:
        """uint8 images (C, H, W) as decoded; of a video, `most` frames evenly over its time.

        Raises:
            ExampleError: the file is broken.
        """
        if isinstance(self.item, Image):
            return [read_image(self.item.file, self.size)]
        wanted = min(most, self.size.frames)
        numbers = [int((i + 0.5) * self.size.frames / wanted) for i in range(wanted)]
        return list(read_frames(self.item.file, self.size, numbers))


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
    """How much there is in a microbatch; `cost` is that of its media for the encoders."""

    samples: int
    tokens: int
    learnt: int
    rows: int
    cost: float


@dataclass(frozen=True)
class StepView:
    """The first step of the first replica; its microbatches in any order.

    Attributes:
        steps: of an epoch.
        used: share of the token budget that is used over the epoch; of rows that are padded, without their padding.
    """

    steps: int
    used: float
    microbatches: Sequence[MicrobatchView]


def sources_of(data: MultimodalDataModule, split: Split, stream_examples: int = 200) -> list[SourceView]:
    """All sources of a split, measured.

    Args:
        stream_examples: how many of each stream.
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


def chosen(views: Sequence[SourceView], samples: int) -> list[tuple[SourceView, int]]:
    """Examples to look at: of each source in turn, evenly over those that can be used."""
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
    """An example as it is encoded for training, without augmentation."""
    example = view.source[index]
    name = name_of(view.source, index, example)
    sample, sizes = encoded(example, data.encoder, data.token_budget, name, learns=split == "train")
    items = _items(example, sample, sizes)
    spans = list(_spans(sample, items, data.encoder.tokenizer))
    return SampleView(name, spans, len(sample.tokens), sum(sample.labelled), items)


def _items(example: Example, sample: Sample, sizes: Sequence[Size]) -> list[ItemView]:
    """In the order of the text, then the target."""
    left = list(zip(example.media, sizes, strict=False))
    counts: Counter[str] = Counter()
    views: list[ItemView] = []
    for media in sample.media:
        at = next(i for i, (item, _) in enumerate(left) if item.file.name == media.name)
        item, size = left.pop(at)
        kind = type(item).__name__.lower()
        counts[kind] += 1
        views.append(ItemView(f"{kind} {counts[kind]}", item, size, media.rows))
    if example.target is not None:
        views.append(ItemView("target", example.target, sizes[-1], sample.targets[0].rows))
    return views


def _spans(sample: Sample, items: Sequence[ItemView], tokenizer: Any) -> Iterator[Span]:
    belongs: dict[int, int] = {}
    places_of = [media.places for media in sample.media]
    places_of += [range(target.start, target.start + target.rows) for target in sample.targets]
    for number, places in enumerate(places_of):
        belongs |= dict.fromkeys(places, number)

    def kind_of(place: int) -> tuple[Kind, int]:
        if place in belongs:
            return ("target" if belongs[place] >= len(sample.media) else "media"), belongs[place]
        return ("learnt" if sample.labelled[place] else "given"), -1

    before = ""
    for (kind, number), run in groupby(range(len(sample.tokens)), kind_of):
        places = list(run)
        whole = tokenizer.decode(
            sample.tokens[: places[-1] + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if number >= 0:
            yield Span(kind, f"{items[number].label}: {len(places)} tokens")
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
    """How samples are packed; ``None``: there is nothing to pack, or it is a stream, which is packed as it comes.

    Args:
        microbatches: of a step, as the strategy asks; ``None``: the DataModule's.
        replicas: data-parallel ones.
    """
    if any(view.stream for view in views) or not views or not all(view.usable for view in views):
        return None
    measured = [view.measured for view in views]
    sampler = data.sampler(split, measured, microbatches, {"num_replicas": replicas, "rank": 0})
    first, used, bins = None, 0, 0
    for step in sampler:
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
