"""Runs a case on its processes and in one process by plain autograd, and says how far apart they are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tests.layouts.cases import Case
from tests.layouts.models import Data, Record, module_of
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer, weights

STEPS = 20
CLIP = 0.5
SMALL = 1e-3
"""The error of a gradient that is smaller than this part of the largest one is relative to this part."""
ROUNDING = 1e-6
"""A gradient that is smaller than this part of the largest one is nothing but rounding (that of the bias of keys would
be zero without it). Its error is relative to the largest gradient, and its parameter is not compared after AdamW's
steps, which are as large whatever the gradient is."""


@dataclass(frozen=True)
class Result:
    """The largest differences from one process, over all ranks; relative ones.

    Attributes:
        loss, norm: of the first step.
        gradient: of any parameter in the first step, relative to the norm of its gradient; see `SMALL`.
        losses: of all steps, and of a validation after the last one.
        clipped: of the norm after clipping, in all steps.
        weight: of any parameter after the last step, relative to how far training has moved it.
        half: how far the gradients of bfloat16 are from those of float32, over how far they are in one process: mean
            of all parameters. ``None``: not measured.
    """

    loss: float
    gradient: float
    norm: float
    losses: float
    clipped: float
    weight: float
    half: float | None = None


def measure(case: Case, steps: int = STEPS, half: bool = True) -> Result:
    """
    Args:
        steps: the number of optimizer steps.
        half: whether to train with bfloat16 as well.

    Raises:
        AssertionError: a parameter is on no rank, or has a gradient only here or only there.
    """
    records = on_ranks(case.world, _on_rank, case, steps, half, timeout=900)
    alone = case.in_one_process
    result = compare([record for record, _ in records], _plain(alone, steps))
    return replace(result, half=_half_ratio([record for _, record in records if record], alone) if half else None)


def compare(found: list[Record], expected: Record) -> Result:
    """The differences of what all ranks have from what one process has."""
    _check_complete(found, expected)
    return Result(
        loss=_furthest(found, expected, lambda record: record.losses[:1]),
        gradient=max(_errors(found, expected)),
        norm=_furthest(found, expected, lambda record: record.norms[:1]),
        losses=_furthest(found, expected, lambda record: [*record.losses, *record.validated]),
        clipped=_furthest(found, expected, lambda record: record.clipped),
        weight=max(_drifts(found, expected)),
    )


# -- runs --------------------------------------------------------------------------------------------------------------


def _on_rank(rank: int, case: Case, steps: int, half: bool) -> tuple[Record, Record | None]:
    return fit_on_rank(case, steps), fit_on_rank(case, 1, precision="bf16-true") if half else None


def fit_on_rank(case: Case, steps: int, strategy: dict[str, Any] | None = None, **trainer: Any) -> Record:
    """What this rank has of a run; with further arguments of strategy and Trainer."""
    arguments = {**case.strategy_arguments(), **(strategy or {})}
    made = pipeline_trainer(case.world, arguments, max_epochs=1, gradient_clip_val=CLIP, **trainer)
    return fit(made, case, steps)


def fit_plain(case: Case, steps: int, given: dict[str, Tensor] | None = None, **trainer: Any) -> Record:
    """One process without a pipeline."""
    return fit(plain_trainer(max_epochs=1, gradient_clip_val=CLIP, **trainer), case, steps, given)


def fit(trainer: Any, case: Case, steps: int, given: dict[str, Tensor] | None = None) -> Record:
    module = module_of(case)
    module.given = given or {}
    trainer.fit(module, Data(case, steps, replicas=case.mesh[0]))
    if hasattr(trainer.strategy, "open_module"):
        trainer.strategy.open_module()
    record = module.record
    record.end = weights(module)
    logged = sorted(trainer.callback_metrics.items())
    record.validated = [float(v) for name, v in logged if name.startswith("val/") and name not in NOT_SMOOTH]
    return record


NOT_SMOOTH = ("val/accuracy", "val/exact_match")
"""Numbers that rounding can change by much, as another token becomes the most likely one."""


@lru_cache(maxsize=16)
def _plain(case: Case, steps: int, precision: Any = "32-true") -> Record:
    return fit_plain(case, steps, precision=precision)


@lru_cache(maxsize=16)
def _plain_from_half(case: Case) -> Record:
    """In float32, from the weights that bfloat16 begins with."""
    return fit_plain(case, 1, _plain(case, 1, precision="bf16-true").start)


# -- comparing ---------------------------------------------------------------------------------------------------------


def _canonical(named: dict[str, Any], expected: Record) -> Iterator[tuple[str, Any]]:
    """By the names of one process, where an output weight is the embedding if it is tied to it."""
    (embedding,) = [name for name in expected.end if name.endswith("embed_tokens.weight")]
    for name, value in named.items():
        yield name if name in expected.end else embedding, value


def _check_complete(records: list[Record], expected: Record) -> None:
    for attribute in ("gradients", "end"):
        seen = {name for record in records for name, _ in _canonical(getattr(record, attribute), expected)}
        assert seen == getattr(expected, attribute).keys(), seen ^ getattr(expected, attribute).keys()
    for record in records:
        for name, gradient in _canonical(record.gradients, expected):
            assert (gradient is None) == (expected.gradients[name] is None), name


def _largest(expected: Record) -> float:
    return max(float(g.norm()) for g in expected.gradients.values() if g is not None)


def _errors(records: list[Record], expected: Record) -> Iterator[float]:
    largest = _largest(expected)
    for record in records:
        for name, gradient in _canonical(record.gradients, expected):
            should_be = expected.gradients[name]
            if gradient is not None and should_be is not None:
                error, size = float((gradient.double() - should_be.double()).norm()), float(should_be.double().norm())
                yield error / (max(size, SMALL * largest) if size > ROUNDING * largest else largest)


def _drifts(records: list[Record], expected: Record) -> Iterator[float]:
    """Of the weights whose gradients are more than rounding."""
    largest = _largest(expected)
    for record in records:
        for name, value in _canonical(record.end, expected):
            gradient, should_be = expected.gradients.get(name), expected.end[name]
            if gradient is not None and gradient.norm() > ROUNDING * largest:
                yield float((value - should_be).norm() / (should_be - expected.start[name]).norm())
            elif name not in expected.gradients:
                assert torch.equal(value, expected.start[name]), f"{name} is frozen, but has changed"


def _half_ratio(found: list[Record], alone: Case) -> float:
    return half_ratio(found, _plain_from_half(alone), _plain(alone, 1, precision="bf16-true"))


def half_ratio(found: list[Record], exact: Record, plain: Record) -> float:
    """See `Result.half`.

    Args:
        exact, plain: one process in float32 and in bfloat16, from the same weights.
    """
    errors, of_plain = [list(_errors(records, exact)) for records in (found, [plain])]
    return (sum(errors) / len(errors)) / (sum(of_plain) / len(of_plain))


def _furthest(records: list[Record], expected: Record, of: Callable[[Record], list[float]]) -> float:
    return max(
        abs(value - should) / abs(should)
        for record in records
        for value, should in zip(of(record), of(expected), strict=True)
    )
