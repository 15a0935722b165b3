"""Measures every example of a source once: tokens, costs, sizes of media, or what is wrong with it.

This is done by one process per node before training, and kept on disk: all that packing needs is then known everywhere,
and no rank opens a media file that it does not own. Knows sources and encoders; knows nothing of ranks.
"""

import hashlib
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from ..encoding.chat import ChatEncoder
from ..example import Example, ExampleError, Size
from ..loading.collate import Sample
from ..media.decoding import measure
from ..sources.source import Source
from ..sources.stream import Stream

FORMAT = 4
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """What is known of one example.

    Attributes:
        tokens: of its sample, placeholders included.
        learnt: how many of them are to be learnt.
        rows: how many of them stand for its media.
        encoder, generator: cost of its media and target.
        sizes: of its media and its target.
        error: why it cannot be used; empty: it can.
    """

    tokens: int = 0
    learnt: int = 0
    rows: int = 0
    encoder: float = 0.0
    generator: float = 0.0
    sizes: tuple[Size, ...] = ()
    error: str = ""


class Measurements:
    """Of all examples of a source, in flat arrays that worker processes share without copies.

    Attributes:
        tokens: (n,) of each example; 0 for one that cannot be used.
        encoder: (n,) cost of its media.
        errors: what is wrong, by number.
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.tokens, self.encoder = arrays["tokens"], arrays["encoder"]
        self.errors = dict(zip(arrays["bad"].tolist(), arrays["errors"].tolist(), strict=True))

    @classmethod
    def of(cls, measured: "list[Measured]") -> "Measurements":
        bad = [i for i, m in enumerate(measured) if m.error]
        sizes = [(s.height, s.width, s.frames, s.seconds) for m in measured for s in m.sizes]
        return cls(
            {
                "tokens": np.array([m.tokens for m in measured], dtype=np.int64),
                "learnt": np.array([m.learnt for m in measured], dtype=np.int64),
                "rows": np.array([m.rows for m in measured], dtype=np.int64),
                "encoder": np.array([m.encoder for m in measured], dtype=np.float64),
                "generator": np.array([m.generator for m in measured], dtype=np.float64),
                "first": np.cumsum([0, *(len(m.sizes) for m in measured)], dtype=np.int64),
                "sizes": np.array(sizes, dtype=np.float64).reshape(-1, 4),
                "bad": np.array(bad, dtype=np.int64),
                "errors": np.array([measured[i].error for i in bad], dtype=np.str_),
            }
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def sizes(self, index: int) -> list[Size]:
        """Of an example's media and its target."""
        first, last = self.arrays["first"][index : index + 2]
        rows = self.arrays["sizes"][first:last].tolist()
        return [Size(int(height), int(width), int(frames), seconds) for height, width, frames, seconds in rows]

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            np.savez(file, allow_pickle=False, **self.arrays)
        os.replace(file.name, path)

    @classmethod
    def load(cls, path: Path) -> "Measurements":
        with np.load(path, allow_pickle=False) as arrays:
            return cls(dict(arrays))


class _Measuring(Dataset):
    """Measures instead of encoding."""

    def __init__(self, source: Source, encoder: ChatEncoder, budget: int, learns: bool) -> None:
        self.source, self.encoder, self.budget, self.learns = source, encoder, budget, learns

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Measured:
        name = name_of(self.source, index)
        try:
            example = self.source[index]
            name = name_of(self.source, index, example)
            sample, sizes = encoded(example, self.encoder, self.budget, name, learns=self.learns)
        except Exception as error:  # a source may raise what it likes: it is told which example did
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
) -> tuple[Sample, tuple[Size, ...]]:
    """The sample of an example, and the sizes of its media and target, read from their headers.

    Args:
        draw: what augmentation depends on; ``None``: there is none.
        learns: whether it is to be learnt from.

    Raises:
        ExampleError: it cannot be used.
    """
    items = example.media if example.target is None else [*example.media, example.target]
    sizes = tuple(measure(item) for item in items)
    sample = encoder.encode(example, sizes, name, draw)
    if len(sample.tokens) > budget:
        raise ExampleError(
            f"has {len(sample.tokens)} tokens, more than a microbatch may have: shorten it, allow fewer rows per "
            f'image or video, raise token_budget={budget}, or set packing.truncation to "end", which cuts off its end'
        )
    if learns and not any(sample.labelled) and not sample.targets:
        raise ExampleError(
            "has nothing to learn: no reply that is not empty and to be learnt, and no target. Leave it out, or set "
            "learn in its messages"
        )
    return sample, sizes


def reason_of(error: Exception) -> str:
    """What a message about an example says of any exception: sources may raise what they like."""
    return str(error) if isinstance(error, ExampleError) else f"{type(error).__name__}: {error}"


def name_of(source: Source | Stream, index: int, example: Example | None = None) -> str:
    """What errors call an example."""
    given = f" ({example.name})" if example is not None and example.name else ""
    return f"{source.name}, sample {source.origin(index)}{given}"


def measurements(
    source: Source,
    encoder: ChatEncoder,
    budget: int,
    folder: Path,
    workers: int = 0,
    read_only: bool = False,
    learns: bool = False,
) -> Measurements:
    """Of a source: from disk if they are there and still right, else made and saved.

    Args:
        folder: where they are kept.
        workers: processes that measure.
        read_only: take what is there, as it was made a moment ago by another process of this node.
        learns: whether the examples are to be learnt from.
    """
    settings = [repr((FORMAT, budget, learns)), encoder.fingerprint(), source.identity()]
    key = hashlib.sha256("\n".join(settings).encode()).hexdigest()[:24]
    stamp = hashlib.sha256((source.fingerprint() or "").encode()).hexdigest()[:16]
    path = folder / f"{key}-{stamp}.npz"
    if path.exists() and (read_only or source.fingerprint() is not None):
        known = Measurements.load(path)
        if read_only or not known.errors:  # what was wrong may have been put right
            return known
    made = measure_all(source, encoder, budget, workers, learns)
    made.save(path)
    return made


def measure_all(
    source: Source, encoder: ChatEncoder, budget: int, workers: int = 0, learns: bool = False
) -> Measurements:
    """Of a source, whatever is on disk; with a progress bar where somebody may watch. Arguments as above."""
    log.info("measuring the %d examples of %s", len(source), source.name)
    loader = DataLoader(_Measuring(source, encoder, budget, learns), batch_size=None, num_workers=workers)
    console = Console(stderr=True)
    watched = track(
        loader,
        f"measuring {source.name}",
        len(source),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    return Measurements.of(list(watched))
