"""Cuts off the end of samples that are too long."""

from dataclasses import replace

from ..errors import ExampleError
from ..loading.collate import Sample


def cut(sample: Sample, most: int | None) -> Sample:
    """The first `most` tokens of a sample; ``None``: all of them.

    Raises:
        ExampleError: an item of media or a target would be cut off, or nothing to learn would be left.
    """
    length = len(sample.tokens)
    if most is None or length <= most:
        return sample
    where = f"has {length} tokens, and cannot be cut to {most}"
    for item in sample.media:
        if max(item.indices) >= most:
            raise ExampleError(f"{where}: {item.name} would be cut off, at least in part")
    if sample.targets:
        raise ExampleError(f"{where}: the target {sample.targets[0].name} comes last")
    labelled = sample.labelled[:most]
    if any(sample.labelled) and not any(labelled):
        raise ExampleError(f"{where}: nothing to learn would be left")
    return replace(sample, tokens=sample.tokens[:most], labelled=labelled)
