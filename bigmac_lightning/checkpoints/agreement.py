"""What the ranks of a run find out about a checkpoint, each on its own, and what they then all do alike.

All functions are collective over torch.distributed's default group, or over the group that is given: a thread that
saves has a group of its own. Without a process group they work in one process.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from bigmac_lightning.checkpoints.mismatches import first_few

KINDS = (FileNotFoundError, PermissionError, OSError, ValueError, TypeError)
"""Exceptions that keep their class when they are raised on all ranks; of any other one it becomes a RuntimeError."""


def place_of(group: Any = None) -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)


def from_everyone(own: Any, group: Any = None) -> list[Any]:
    """The values of all ranks, by rank."""
    if not dist.is_initialized():
        return [own]
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    return everyone


def agree(problems: Sequence[str], what: str, group: Any = None) -> None:
    """Raise a ValueError on all ranks if any rank found a problem, so that no rank waits for another."""
    found = sorted({problem for part in from_everyone(list(problems), group) for problem in part})
    if found:
        raise ValueError(f"{what}: {first_few(found)}")


def together(function: Callable[[], Any], what: str, group: Any = None) -> Any:
    """Call a function, which works on files, on every rank.

    Args:
        what: what cannot be done if the function raises, for the error; "": its own errors say that.

    Returns: its result on this rank.

    Raises:
        OSError, ValueError, TypeError, RuntimeError: the function raised on some rank. All ranks raise the same, which
            names `what`, the first such rank and its reason.
    """
    done, failed = _tried(function)
    _raise_first(from_everyone(failed and (_kind(failed), _reason(failed)), group), what, failed)
    return done


def results_of(function: Callable[[], Any], what: str, group: Any = None) -> list[Any]:
    """Call a function on every rank; like `together`.

    Returns: the results of all ranks, by rank.
    """
    done, failed = _tried(function)
    everyone = from_everyone((done, failed and (_kind(failed), _reason(failed))), group)
    _raise_first([failure for _, failure in everyone], what, failed)
    return [result for result, _ in everyone]


def on_first_rank(function: Callable[[], Any], what: str, group: Any = None) -> Any:
    """Call a function on global rank 0; like `together`.

    Returns: its result, on all ranks.
    """
    first = place_of(group)[0] == 0
    return results_of(lambda: function() if first else None, what, group)[0]


def _tried(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def _raise_first(failures: Sequence[tuple[int | None, str] | None], what: str, cause: Exception | None) -> None:
    """Raise the error of the first rank that has one, if there is any."""
    for rank, failure in enumerate(failures):
        if failure is not None:
            kind, reason = failure
            error = RuntimeError if kind is None else KINDS[kind]
            raise error(f"{what}{': ' if what else ''}{f'rank {rank}: ' if rank else ''}{reason}") from cause


def _kind(error: Exception) -> int | None:
    return next((i for i, kind in enumerate(KINDS) if isinstance(error, kind)), None)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
