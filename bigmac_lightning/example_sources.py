"""Which examples a DataModule has, for those who let a model reply to them."""

from typing import Any


def sources_of(data: Any, split: str) -> list[Any]:
    """The sources of a split whose examples can be read by index; streams are left out.

    Raises:
        ValueError: the DataModule has no sources.
    """
    if not hasattr(data, "split_sources"):
        raise ValueError(f"{type(data).__name__} has no sources of examples; a MultimodalDataModule has some")
    return [source for source in data.split_sources(split) if hasattr(source, "__getitem__")]


def name_of(source: Any, index: int) -> str:
    """What an example is called in lists."""
    return f"{source.name}, sample {source.origin(index)}"
