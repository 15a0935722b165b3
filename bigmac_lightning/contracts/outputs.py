"""The results of a batch, and of one stage of the LLM on one microbatch."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Mode = Literal["train", "evaluate", "sample"]


@dataclass
class PipelineOutput:
    """The result of `pipeline(batch)`, equal on every rank of a pipeline.

    Attributes:
        loss: scalar, the weighted loss of the whole step: of all data-parallel replicas in training, and of this
            replica in evaluation, where replicas may have different numbers of batches. Return it from training_step.
        metrics: detached scalars ready for `log_dict`: "loss", and each part by name ("text", each generator).
        predictions: (sum of L,) most likely token at each labelled position, in the order of `batch.labels`;
            ``None`` while training.
        samples: one tensor per item of `batch.targets` in mode "sample", float32; else ``None``.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    predictions: Tensor | None = None
    samples: list[Tensor] | None = None


@dataclass
class StageOutput:
    """The result of one stage on one microbatch.

    Attributes:
        hidden: h_BSD for the next stage; ``None`` after the last.
        last: h_BSD after the last stage.
        extras: further tensors for the next stage; see `LanguageModel`.
        losses: "text", the sum of the token losses, if there are labels; and auxiliary losses (last stage only).
        conditions: condition_ND rows of all generator targets (last stage; ``None`` if there are none).
        predictions: (L,) token ids (last stage, not while training).
    """

    hidden: Tensor | None = None
    last: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    conditions: Tensor | None = None
    predictions: Tensor | None = None
