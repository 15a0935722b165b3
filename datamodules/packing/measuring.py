"""Measures every example of a source once: its tokens, its costs, the sizes of its media, or why it cannot be used.

One process per node does this before training, and stores the measurements on disk. Every process can then pack all
examples, and no rank opens a media file that it does not own.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from ..encoding.chat import ChatEncoder
from ..errors import ExampleError, reason_of
from ..example import Example, Size
from ..kept_arrays import keep, mapped, of_texts, texts_of
from ..left_out import remaining
from ..limits import Limits
from ..loading.collate import Sample
from ..media.decoding import measure
from ..sources.source import Source
from ..sources.stream import Stream

FORMAT = 7
"""Version of the stored measurements; a change of what is measured needs another one."""

PIECE, JOINED = 32, 1 << 16
"""Examples that a worker measures at a time, and that are made arrays together."""

SHOWN_ERRORS = 10
"""Broken examples that one error or warning lists; it counts the others."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """The measurements of one example.

    Attributes:
        tokens: number of tokens of its sample, placeholders included.
        learnt: how many of them are learnt.
        rows: how many of them stand for its media.
        encoder: cost of its media, in the unit of their processor.
        target: cost of its target, in the unit of its processor.
        sizes: of its media and its target.
        error: why it cannot be used; empty: it can be used.
    """

    tokens: int = 0
    learnt: int = 0
    rows: int = 0
    encoder: float = 0.0
    target: float = 0.0
    sizes: tuple[Size, ...] = ()
    error: str = ""


class Measurements:
    """The measurements of all n examples of a source, in flat arrays. If they lie on disk, all processes map them.

    Attributes:
        arrays: the fields of `Measured` as arrays (n,); "sizes" (items, 4) of all examples, of which example i has
            those from "first"[i] up to "first"[i + 1]; and "bad", the numbers of the examples with "errors", whose
            bytes end at "error_ends".
        tokens: (n,) number of tokens of each example; 0 for one that cannot be used.
        errors: why examples cannot be used, by their numbers.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], place: Path | None = None) -> None:
        """
        Args:
            place: the file that the arrays are mapped from. Workers map it as well, and the arrays are not sent.
        """
        self.arrays, self._place = dict(arrays), place
        self.tokens = arrays["tokens"]
        errors = texts_of(arrays["errors"], arrays["error_ends"])
        self.errors = dict(zip(arrays["bad"].tolist(), errors, strict=True))

    @classmethod
    def of(cls, measured: list[Measured]) -> "Measurements":
        bad = [i for i, m in enumerate(measured) if m.error]
        sizes = [(s.height, s.width, s.frames, s.seconds) for m in measured for s in m.sizes]
        errors, error_ends = of_texts([measured[i].error for i in bad])
        return cls(
            {
                "tokens": np.array([m.tokens for m in measured], dtype=np.int64),
                "learnt": np.array([m.learnt for m in measured], dtype=np.int64),
                "rows": np.array([m.rows for m in measured], dtype=np.int64),
                "encoder": np.array([m.encoder for m in measured], dtype=np.float64),
                "target": np.array([m.target for m in measured], dtype=np.float64),
                "first": np.cumsum([0, *(len(m.sizes) for m in measured)], dtype=np.int64),
                "sizes": np.array(sizes, dtype=np.float64).reshape(-1, 4),
                "bad": np.array(bad, dtype=np.int64),
                "errors": errors,
                "error_ends": error_ends,
            }
        )

    @classmethod
    def joined(cls, parts: Iterable[Sequence[Measured]]) -> "Measurements":
        """The measurements of one part after another. There may be millions, of which few are objects at a time."""
        made, waiting = list[dict[str, np.ndarray]](), list[Measured]()
        for part in parts:
            waiting += part
            if len(waiting) >= JOINED:
                made.append(cls.of(waiting).arrays)
                waiting = []
        made.append(cls.of(waiting).arrays)
        examples = np.cumsum([0, *(len(arrays["tokens"]) for arrays in made)])
        items = np.cumsum([0, *(len(arrays["sizes"]) for arrays in made)])
        texts = np.cumsum([0, *(len(arrays["errors"]) for arrays in made)])
        for number, arrays in enumerate(made):
            arrays["bad"] += examples[number]
            arrays["error_ends"] += texts[number]
            arrays["first"] = arrays["first"][bool(number) :] + items[number]
        return cls({name: np.concatenate([arrays[name] for arrays in made]) for name in made[0]})

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._place is not None and self._place.exists():
            return type(self).load, (self._place,)
        return type(self), (self.arrays,)

    @property
    def number_usable(self) -> int:
        """How many examples can be used."""
        return len(self) - len(self.arrays["bad"])

    def usable(self, places: np.ndarray) -> np.ndarray:
        """The numbers of the examples at places (n,) among those that can be used."""
        return remaining(places, self.arrays["bad"])

    def sizes(self, index: int) -> list[Size]:
        """The sizes of an example's media, then of its target."""
        first, last = self.arrays["first"][index : index + 2]
        rows = self.arrays["sizes"][first:last].tolist()
        return [Size(int(height), int(width), int(frames), seconds) for height, width, frames, seconds in rows]

    def replaced(self, examples: Mapping[int, Measured]) -> "Measurements":
        """The measurements with other ones of some examples that could not be used."""
        arrays = dict(self.arrays)
        for name in ("tokens", "learnt", "rows", "encoder", "target"):
            arrays[name] = np.array(arrays[name])  # in memory, if it was mapped
            for index, found in examples.items():
                arrays[name][index] = getattr(found, name)
        first, own = self.arrays["first"], Measurements.of(list(examples.values())).arrays
        counts = np.diff(first)
        places = np.repeat([first[index] for index in examples], np.diff(own["first"]))
        arrays["sizes"] = np.insert(arrays["sizes"], places.astype(np.int64), own["sizes"], axis=0)
        counts[list(examples)] += np.diff(own["first"])
        arrays["first"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        errors = self.errors | {index: found.error for index, found in examples.items()}
        left = sorted(index for index, error in errors.items() if error)
        arrays["bad"] = np.array(left, dtype=np.int64)
        arrays["errors"], arrays["error_ends"] = of_texts([errors[index] for index in left])
        return Measurements(arrays)

    def save(self, place: Path) -> None:
        """Write a file, so that a run which is killed leaves no part of one."""
        keep(place, self.arrays)

    @classmethod
    def load(cls, place: Path) -> "Measurements":
        """
        Raises:
            ValueError: the file is damaged, or was not written by `save`.
        """
        expected = cls.of([]).arrays
        try:
            arrays = mapped(place, list(expected))
            for name, array in expected.items():
                if arrays[name].dtype.kind != array.dtype.kind or arrays[name].shape[1:] != array.shape[1:]:
                    raise ValueError(
                        f"its array {name} has the type {arrays[name].dtype} and shape {arrays[name].shape}"
                    )
            lengths = {name: len(array) for name, array in arrays.items()}
            of_examples = {lengths[name] for name in ("tokens", "learnt", "rows", "encoder", "target")}
            if of_examples != {lengths["first"] - 1} or lengths["bad"] != lengths["error_ends"]:
                raise ValueError(f"its arrays have the lengths {lengths}")
            return cls(arrays, place)
        except (ValueError, OSError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


class _Measuring(Dataset):
    """A dataset of the measurements of some examples of a source, in pieces of several examples."""

    def __init__(
        self, source: Source, encoder: ChatEncoder, budget: int, learns: bool, examples: Sequence[int]
    ) -> None:
        self.source, self.encoder, self.budget, self.learns = source, encoder, budget, learns
        self.examples = examples

    def __len__(self) -> int:
        return -(-len(self.examples) // PIECE)

    def __getitem__(self, piece: int) -> list[Measured]:
        return [self._measured(index) for index in self.examples[PIECE * piece : PIECE * (piece + 1)]]

    def _measured(self, index: int) -> Measured:
        name = name_of(self.source, index)
        try:
            example = self.source[index]
            name = name_of(self.source, index, example)
            limits = self.source.limits
            sample, sizes = encoded(example, self.encoder, self.budget, name, learns=self.learns, limits=limits)
        except Exception as error:  # a source may raise anything; the error names the example
            return Measured(error=f"{name} {reason_of(error)}")
        return Measured(
            len(sample.tokens),
            sum(sample.labelled),
            sum(item.tokens for item in sample.media),
            sum(item.cost for item in sample.media),
            sum(item.cost for item in sample.targets),
            sizes,
        )


def encoded(
    example: Example,
    encoder: ChatEncoder,
    budget: int,
    name: str,
    draw: tuple[object, ...] | None = None,
    learns: bool = False,
    limits: Limits = Limits(),
) -> tuple[Sample, tuple[Size, ...]]:
    """The sample of an example, and the sizes of its media and target, which are read from the headers of their files.

    Args:
        budget: maximum number of tokens.
        name: what errors call the example.
        draw: what augmentation depends on; ``None``: the media are not augmented.
        learns: whether the example is for training, and must have something to learn.
        limits: those of its source.

    Raises:
        ExampleError: the example cannot be used.
    """
    items = example.media if example.target is None else [*example.media, example.target]
    sizes = tuple(measure(item, limits) for item in items)
    sample = encoder.encode(example, sizes, name, draw)
    if len(sample.tokens) > budget:
        raise ExampleError(
            f"has {len(sample.tokens)} tokens, more than a microbatch may have: shorten it, allow fewer rows per "
            f'image or video, raise token_budget={budget}, or set packing.truncation to "end", which cuts off its end'
        )
    if not sample.tokens:
        raise ExampleError("has no tokens: the chat template writes nothing for it")
    if learns and not any(sample.labelled) and not sample.targets:
        raise ExampleError(
            "has nothing to learn: neither a target nor a reply that is learnt and not empty. Leave it out, or set "
            "learn in its messages"
        )
    return sample, sizes


def name_of(source: Source | Stream, index: int, example: Example | None = None) -> str:
    """What errors call an example: its source, its number, and its own name if it has one."""
    own_name = f" ({example.name})" if example is not None and example.name else ""
    return f"{source.name}, sample {source.origin(index)}{own_name}"


def place_of(source: Source, encoder: ChatEncoder, budget: int, folder: Path, learns: bool) -> Path:
    """Where the measurements of a source are stored. Arguments are as in `measurements`."""
    settings = [repr((FORMAT, budget, learns, source.limits)), encoder.fingerprint(), source.identity()]
    key = hashlib.sha256("\n".join(settings).encode()).hexdigest()[:24]
    stamp = hashlib.sha256((source.fingerprint() or "").encode()).hexdigest()[:16]
    return folder / f"{key}-{stamp}.safetensors"


def measurements(
    source: Source,
    encoder: ChatEncoder,
    budget: int,
    folder: Path,
    workers: int = 0,
    read_only: bool = False,
    learns: bool = False,
) -> Measurements:
    """The measurements of a source: they are read from disk if they are still right, otherwise made and stored.

    Args:
        budget: maximum number of tokens of an example.
        folder: where measurements are stored.
        workers: number of processes that measure.
        read_only: whether a stored file is taken as it is, since another process of this node has just made it.
        learns: whether the examples are for training.
    """
    path = place_of(source, encoder, budget, folder, learns)
    if path.exists() and (read_only or source.fingerprint() is not None):
        try:
            stored = Measurements.load(path)
            if len(stored) != len(source):
                raise ValueError(f"it has {len(stored)} examples, and the source {len(source)}")
        except ValueError as error:
            if read_only:
                raise ValueError(f"{path} was damaged while the run began: {error}") from error
            log.warning("%s is damaged, and the examples are measured again: %s", path, error)
        else:
            return stored if read_only else _mended(stored, source, encoder, budget, workers, learns, path)
    made = measure_all(source, encoder, budget, workers, learns)
    made.save(path)
    return Measurements.load(path)


def _mended(
    stored: Measurements, source: Source, encoder: ChatEncoder, budget: int, workers: int, learns: bool, path: Path
) -> Measurements:
    """Measurements in which the examples that could not be used are measured again, as they may have been mended."""
    broken = list(stored.errors)
    pieces = _measured(source, encoder, budget, workers, learns, broken) if broken else []
    again = dict(zip(broken, chain.from_iterable(pieces), strict=True))
    if all(found.error == stored.errors[index] for index, found in again.items()):
        return stored
    stored.replaced(again).save(path)
    return Measurements.load(path)


def measure_all(
    source: Source, encoder: ChatEncoder, budget: int, workers: int = 0, learns: bool = False
) -> Measurements:
    """Measure a source, whatever is stored. Arguments are as in `measurements`."""
    return Measurements.joined(_measured(source, encoder, budget, workers, learns, range(len(source))))


def _measured(
    source: Source, encoder: ChatEncoder, budget: int, workers: int, learns: bool, examples: Sequence[int]
) -> Iterable[list[Measured]]:
    """The measurements of these examples, in pieces, with a progress bar in a terminal."""
    log.info("measuring %d of the %d examples of %s", len(examples), len(source), source.name)
    pieces = _Measuring(source, encoder, budget, learns, examples)
    loader = DataLoader(pieces, batch_size=None, num_workers=workers)
    console = Console(stderr=True)
    return track(
        loader,
        f"measuring {source.name}",
        len(pieces),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def report_errors(measured: Sequence[Measurements], split: str, on_error: Literal["raise", "skip"]) -> None:
    """Tell the user which examples of a split cannot be used.

    Raises:
        ExampleError: there are such examples, and `on_error` is "raise".
    """
    errors = [text for source in measured for text in source.errors.values()]
    if not errors:
        return
    shown = "\n".join(errors[:SHOWN_ERRORS])
    if len(errors) > SHOWN_ERRORS:
        shown += f"\n... and {len(errors) - SHOWN_ERRORS} more"
    total = sum(map(len, measured))
    if on_error == "raise":
        raise ExampleError(
            f'{len(errors)} of {total} {split} examples cannot be used (on_error="skip" leaves them out):\n{shown}'
        )
    log.warning("left out %d of %d %s examples:\n%s", len(errors), total, split, shown)
