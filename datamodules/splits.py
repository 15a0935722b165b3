"""The sources of each split, after some examples of the training sources have been held out for validation."""

from collections.abc import Callable, Sequence

from .options import MixtureOptions
from .sources.source import Source
from .sources.splitting import hold_out
from .sources.stream import SourceStream, Stream

Split = str
"""One of "train", "val", "test" and "predict"."""

Sources = Sequence[Source | Stream]


class Splits:
    """
    Args:
        given: returns the sources of a split before examples are held out.
        mixture: the options of the training sources.
        seed: decides which examples are held out, and the order of sources that are read as streams.
        shuffle: whether sources that are read as streams are shuffled.
    """

    def __init__(self, given: Callable[[Split], Sources], mixture: MixtureOptions, seed: int, shuffle: bool) -> None:
        self.given, self.mixture, self.seed, self.shuffle = given, mixture, seed, shuffle
        self._after_holding_out: dict[Split, Sources] | None = None

    def of(self, split: Split) -> Sources:
        """The sources of a split.

        Raises:
            ValueError: the examples cannot be held out.
        """
        if self.mixture.val_split is None or split not in ("train", "val"):
            return self.given(split)
        if self._after_holding_out is None:
            train, held_out = hold_out(self.given("train"), self.mixture.val_split, self.seed)
            self._after_holding_out = {"train": train, "val": [*self.given("val"), *held_out]}
        return self._after_holding_out[split]

    def sources(self, split: Split) -> list[Source]:
        """The sources of a split that are no streams."""
        return [source for source in self.of(split) if isinstance(source, Source)]

    def streams(self, split: Split) -> list[Stream]:
        """All sources of a split as streams if one of them is a stream; otherwise an empty list.

        Raises:
            ValueError: the split cannot have streams, or the length of an epoch is not given.
        """
        sources = self.of(split)
        if not any(isinstance(source, Stream) for source in sources):
            return []
        if split != "train":
            raise ValueError(
                f"{split} has streams, which are for training; give the start of one as a source: Taken(stream, 500)"
            )
        if self.mixture.steps_per_epoch is None or self.mixture.samples_per_epoch is not None:
            raise ValueError(
                "the training sources have streams, whose lengths are not known: set mixture.steps_per_epoch, and not "
                "mixture.samples_per_epoch"
            )
        return [s if isinstance(s, Stream) else SourceStream(s, self.seed, self.shuffle) for s in sources]
