"""Callbacks of Lightning that cannot work with a PipelineModule, and why."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging

REASONS: dict[type[pl.Callback], str] = {
    StochasticWeightAveraging: "copies the model before it has its weights; use WeightAveraging or EMAWeightAveraging",
    ModelPruning: "chooses what to prune before the model has its weights, and compares all of them with one another; "
    "prune the exported model",
}


def check_callbacks(trainer: pl.Trainer) -> None:
    """Refuse callbacks that would silently do something wrong.

    Raises:
        ValueError: there is one; the message names it and what to use instead.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for callback in callbacks:
        for kind, reason in REASONS.items():
            if isinstance(callback, kind):
                raise ValueError(f"{type(callback).__name__} does not work with a PipelineModule: it {reason}")
