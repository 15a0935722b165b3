"""Measures every example of a source once: its tokens, its costs, the sizes of its media, or why it cannot be used.

One process per node does this before training, and stores the measurements on disk. Every process can then pack all
examples, and no rank opens a media file that it does not own.
"""

import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset, Subset

from ..encoding.chat import ChatEncoder
from ..errors import ExampleError, reason_of
from ..example import Example, Size
from ..limits import Limits
from ..loading.collate import Sample
from ..media.decoding import measure
from ..sources.source import Source
from ..sources.stream import Stream

FORMAT = 6
"""Version of the stored measurements; a change of what is measured needs another one."""

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
    """The measurements of all n examples of a source, in flat arrays that worker processes share without copies.

    Attributes:
        arrays: the fields of `Measured` as arrays (n,); "sizes" (items, 4) of all examples, of which example i has
            those from "first"[i] up to "first"[i + 1]; and "bad", the numbers of the examples with "errors".
        tokens: (n,) number of tokens of each example; 0 for one that cannot be used.
        errors: why examples cannot be used, by their numbers.
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.tokens = arrays["tokens"]
        self.errors = dict(zip(arrays["bad"].tolist(), arrays["errors"].tolist(), strict=True))

    @classmethod
    def of(cls, measured: list[Measured]) -> "Measurements":
        bad = [i for i, m in enumerate(measured) if m.error]
        sizes = [(s.height, s.width, s.frames, s.seconds) for m in measured for s in m.sizes]
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
                "errors": np.array([measured[i].error for i in bad], dtype=np.str_),
            }
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def sizes(self, index: int) -> list[Size]:
        """The sizes of an example's media, then of its target."""
        first, last = self.arrays["first"][index : index + 2]
        rows = self.arrays["sizes"][first:last].tolist()
        return [Size(int(height), int(width), int(frames), seconds) for height, width, frames, seconds in rows]

    def replaced(self, examples: Mapping[int, Measured]) -> "Measurements":
        """The measurements with other ones of some examples that could not be used."""
        arrays = dict(self.arrays)
        for name in ("tokens", "learnt", "rows", "encoder", "target"):
            arrays[name] = arrays[name].copy()
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
        arrays["errors"] = np.array([errors[index] for index in left], dtype=np.str_)
        return Measurements(arrays)

    def save(self, path: Path) -> None:
        """Write a file, so that a run which is killed leaves no part of one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            np.savez(file, allow_pickle=False, **self.arrays)
        os.replace(file.name, path)

    @classmethod
    def load(cls, path: Path) -> "Measurements":
        """
        Raises:
            ValueError: the file is damaged, or was not written by `save`.
        """
        expected = cls.of([]).arrays
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
            if {m.filename for m in members} != {f"{name}.npy" for name in expected} or len(members) != len(expected):
                raise ValueError(f"it has the arrays {[m.filename for m in members]}")
            if any(m.compress_type != zipfile.ZIP_STORED for m in members):  # they could grow without limit
                raise ValueError("its arrays are compressed")
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            for name, array in expected.items():
                if arrays[name].dtype.kind != array.dtype.kind or arrays[name].shape[1:] != array.shape[1:]:
                    raise ValueError(
                        f"its array {name} has the type {arrays[name].dtype} and shape {arrays[name].shape}"
                    )
            return cls(arrays)
        except (ValueError, zipfile.BadZipFile, MemoryError, EOFError, OSError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


class _Measuring(Dataset):
    """A dataset of the measurements of a source's examples."""

    def __init__(self, source: Source, encoder: ChatEncoder, budget: int, learns: bool) -> None:
        self.source, self.encoder, self.budget, self.learns = source, encoder, budget, learns

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Measured:
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
            sum(item.rows for item in sample.media),
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
    settings = [repr((FORMAT, budget, learns, source.limits)), encoder.fingerprint(), source.identity()]
    key = hashlib.sha256("\n".join(settings).encode()).hexdigest()[:24]
    stamp = hashlib.sha256((source.fingerprint() or "").encode()).hexdigest()[:16]
    path = folder / f"{key}-{stamp}.npz"
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
    return made


def _mended(
    stored: Measurements, source: Source, encoder: ChatEncoder, budget: int, workers: int, learns: bool, path: Path
) -> Measurements:
    """Measurements in which the examples that could not be used are measured again, as they may have been mended."""
    broken = list(stored.errors)
    found = _measured(source, encoder, budget, workers, learns, broken) if broken else []
    again = dict(zip(broken, found, strict=True))
    if all(found.error == stored.errors[index] for index, found in again.items()):
        return stored
    made = stored.replaced(again)
    made.save(path)
    return made


def measure_all(
    source: Source, encoder: ChatEncoder, budget: int, workers: int = 0, learns: bool = False
) -> Measurements:
    """Measure a source, whatever is stored. Arguments are as in `measurements`."""
    return Measurements.of(_measured(source, encoder, budget, workers, learns, range(len(source))))


def _measured(
    source: Source, encoder: ChatEncoder, budget: int, workers: int, learns: bool, examples: Sequence[int]
) -> list[Measured]:
    """The measurements of these examples, with a progress bar in a terminal."""
    log.info("measuring %d of the %d examples of %s", len(examples), len(source), source.name)
    chosen = Subset(_Measuring(source, encoder, budget, learns), examples)
    loader = DataLoader(chosen, batch_size=None, num_workers=workers)
    console = Console(stderr=True)
    watched = track(
        loader,
        f"measuring {source.name}",
        len(examples),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    return list(watched)


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
