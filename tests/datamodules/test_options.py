"""The options of a MultimodalDataModule: each group checks its fields, and names the wrong one."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from bigmac_lightning.datamodules import (
    EasyVQADataModule,
    LoadingOptions,
    MixtureOptions,
    MultimodalDataModule,
    PackingOptions,
    Sums,
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixtureOptions(weights=[1, 0]), r"mixture\.weights=\[1, 0\]: every weight must be positive"),
        (lambda: MixtureOptions(samples_per_epoch=0), r"mixture\.samples_per_epoch=0: it must be at least 1"),
        (lambda: MixtureOptions(steps_per_epoch=-1), r"mixture\.steps_per_epoch=-1: it must be at least 1"),
        (lambda: PackingOptions(buffer_size=0), r"packing\.buffer_size=0: it must be at least 1"),
        (lambda: PackingOptions(attention_tokens=0), r"packing\.attention_tokens=0: it must be positive"),
        (lambda: LoadingOptions(prefetch=0), r"loading\.prefetch=0: it must be at least 1"),
        (lambda: MultimodalDataModule(token_budget=0), "token_budget=0: it must be at least 1"),
        (lambda: MultimodalDataModule(microbatches=0), "microbatches=0: it must be at least 1"),
        (lambda: MultimodalDataModule(num_workers=-1), "num_workers=-1: it must be at least 0"),
        (
            lambda: MultimodalDataModule([Sums()], mixture=MixtureOptions([1, 2])),
            r"mixture\.weights=\[1, 2\] for 1 training sources: give one for each",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_there_are_few_arguments() -> None:
    assert len(inspect.signature(MultimodalDataModule).parameters) <= 17
    assert EasyVQADataModule(train_questions=2, val_questions=2).encoder.options.end_of_reply == ""
