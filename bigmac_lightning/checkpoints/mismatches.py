"""How the tensors of a checkpoint differ from those of a model, in words for an error message."""

from collections.abc import Collection, Mapping, Sequence

Shape = tuple[int, ...]

LISTED = 5
"""Problems that an error message names; a wrong checkpoint can have thousands."""


def mismatches(
    stored: Mapping[str, Shape | None],
    model: Mapping[str, Shape | None],
    strict: bool = True,
    allowed: Collection[str] = (),
) -> list[str]:
    """Why a model cannot take its weights from a checkpoint; the list is empty if it can.

    Args:
        stored: the shapes in the checkpoint, by name; ``None`` for entries that are not tensors.
        model: the shapes in the model, likewise.
        strict: whether both must have the same names.
        allowed: names that the checkpoint may have without the model having them.
    """
    found = [f"{name}: missing" for name in model if name not in stored] if strict else []
    found += [
        f"{name}: {stored[name]} in the checkpoint, {shape} in the model"
        for name, shape in model.items()
        if shape is not None and stored.get(name) is not None and stored[name] != shape
    ]
    unknown = sorted(stored.keys() - model.keys() - set(allowed)) if strict else []
    return found + [f"{name}: not in the model" for name in unknown]


def first_few(problems: Sequence[str]) -> str:
    """The first problems in one line, and how many more there are."""
    more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    return "; ".join(problems[:LISTED]) + more
