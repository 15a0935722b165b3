"""Finds out whether a step's losses and gradients are finite, on all ranks alike, and if not, where that began.

The decision is made from numbers that are exchanged anyway, and read together with others at the end of a step. What
each action has made is summed row by row on the device, which keeps NaN and Inf; the sums are read only if a step is
not finite.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bigmac_lightning.contracts.batch import Batch, MediaItem, Microbatch, TargetItem
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.contracts.slices import MicrobatchSlice
from bigmac_lightning.ranks import Ranks
from bigmac_lightning.runtime.gradients import by_device
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.runtime.sharding import local
from bigmac_lightning.training.agreement import SHOWN

FORWARD, BACKWARD = 0, 1_000
"""Where the forwards and the backwards of a batch begin in the order of causes."""


class Finding(NamedTuple):
    """A place where numbers are not finite.

    Attributes:
        batch: number of the batch in its optimizer step; -1 and the number of batches: before and after all of them.
        order: in a batch, what comes first may be the cause of what comes later.
        microbatch: number of the microbatch in its batch.
    """

    batch: int
    order: int
    microbatch: int
    text: str


@dataclass
class _Sums:
    """The sums of rows of one tensor.

    Attributes:
        bad: of each row, whether its sum is not finite: one byte per token is kept until the step ends.
        describe: says what a row is, by its flat index: (microbatch, text).
    """

    order: int
    bad: Tensor
    describe: Callable[[int], tuple[int, str]]


class Record:
    """What the actions of one batch have made on this rank.

    Args:
        batch: the microbatches that are run.
        numbers: the number of each of them in the batch that was given.
        stages: number of the LLM's stages.
    """

    def __init__(self, batch: Batch, numbers: Sequence[int], stages: int) -> None:
        # Only names are kept, and no tensor of the batch: pixels would stay on the device until the step ends.
        self._origins = [[(o.name, o.start, o.stop) for o in m.origins] for m in batch.microbatches]
        self._media = [[(item.encoder, item.origin) for item in m.media] for m in batch.microbatches]
        self._targets = [[(item.generator, item.origin) for item in m.targets] for m in batch.microbatches]
        self._numbers, self._stages = numbers, stages
        self.sums: list[_Sums] = []

    def encoded(
        self, items: Sequence[MediaItem], places: Sequence[tuple[int, int]], features: Sequence[Tensor]
    ) -> None:
        """Note features_ND of each item.

        Args:
            places: the microbatch of each item, and its number there.
        """
        made = [feature for feature in features[: len(items)] if len(feature)]
        if made:
            rows = [place for place, feature in zip(places, features, strict=False) for _ in range(len(feature))]
            self._add(FORWARD, torch.cat(made), lambda row: self._item("encoder", "features", *rows[row]))

    def hidden(self, stage: int, microbatch: int, given: Microbatch, h_BSD: Tensor | None) -> None:
        """Note the hidden states that a stage has made."""
        what = f"stage {stage} made hidden states"
        if h_BSD is not None:
            in_whole = not isinstance(given, MicrobatchSlice)
            self._add(FORWARD + 1 + stage, h_BSD, lambda row: self._place(what, microbatch, row if in_whole else None))

    def loss(self, name: str, microbatch: int, loss: Tensor) -> None:
        """Note a loss of the last stage."""
        order, what = FORWARD + 1 + self._stages, f"the loss {name!r}"
        self._add(order, loss, lambda _: self._place(what, microbatch, None))

    def generated(
        self, losses: dict[str, Tensor], items: Sequence[TargetItem], places: Sequence[tuple[int, int]]
    ) -> None:
        """Note the generators' losses, each of which is a sum over the items of that generator."""
        for name, loss in losses.items():
            mine = [place for item, place in zip(items, places, strict=True) if item.generator == name]
            if mine:
                self._add(FORWARD + 2 + self._stages, loss, partial(self._items, "a loss", mine))

    def follow_conditions(
        self, items: Sequence[TargetItem], places: Sequence[tuple[int, int]], conditions: Tensor
    ) -> None:
        """Note the gradient that the generators give to their conditions."""
        rows = [place for item, place in zip(items, places, strict=True) for _ in range(item.rows)]
        if conditions.requires_grad and len(rows) == len(conditions):
            self._follow(conditions, BACKWARD, lambda row: self._item("generator", "a gradient", *rows[row]))

    def follow_input(self, stage: int, microbatch: int, given: Microbatch, tensor: Tensor | None) -> None:
        """Note the gradient of the hidden states or features that go into a stage, once it is there."""
        what = f"the backward of stage {stage} made a gradient"
        if tensor is not None and tensor.requires_grad:
            order = BACKWARD + self._stages - stage
            # features, and a message with extras, have no row for each token
            in_whole = tensor.dim() == 3 and not isinstance(given, MicrobatchSlice)
            self._follow(tensor, order, lambda row: self._place(what, microbatch, row if in_whole else None))

    def _follow(self, tensor: Tensor, order: int, describe: Callable[[int], tuple[int, str]]) -> None:
        def note(gradient: Tensor) -> None:
            self._add(order, gradient, describe)

        tensor.register_hook(note)

    def _add(self, order: int, tensor: Tensor, describe: Callable[[int], tuple[int, str]]) -> None:
        tensor = tensor.detach()
        rows = tensor.sum(-1, dtype=torch.float32) if tensor.dim() else tensor
        self.sums.append(_Sums(order, ~torch.isfinite(rows), describe))

    def _place(self, what: str, microbatch: int, token: int | None) -> tuple[int, str]:
        number = self._numbers[microbatch]
        names = (name for name, start, stop in self._origins[microbatch] if token is not None and start <= token < stop)
        sample = next((f", sample {name!r}" for name in names), "")
        return number, f"{what} of microbatch {number}{sample}"

    def _item(self, kind: str, made: str, microbatch: int, index: int) -> tuple[int, str]:
        encodes, number, origins = kind == "encoder", self._numbers[microbatch], self._origins[microbatch]
        name, origin = (self._media if encodes else self._targets)[microbatch][index]
        what, sample = "media item" if encodes else "target", f", sample {origins[origin][0]!r}" if origins else ""
        return number, f"{kind} {name!r} made {made} of {what} {index} of microbatch {number}{sample}"

    def _items(self, what: str, places: Sequence[tuple[int, int]], _: int) -> tuple[int, str]:
        texts = [self._item("generator", what, *place) for place in places]
        return texts[0][0], " or ".join(text for _, text in texts[:SHOWN])

    def findings(self, batch: int) -> list[Finding]:
        """Where something is not finite. The host waits for the device."""
        found: list[Finding] = []
        for sums in self.sums:
            bad = sums.bad.flatten().nonzero().flatten().tolist()
            described = dict.fromkeys(sums.describe(row) for row in bad)
            found += [Finding(batch, sums.order, microbatch, text) for microbatch, text in described]
        return found


class FiniteCheck:
    """Tells whether the steps of a run are finite.

    Attributes:
        failed: whether the last optimizer step is not finite; the same on all ranks. Known when the step ends.

    Args:
        ranks: exchanges objects between all ranks.
        gradients: whether gradients must be finite. A scaler of losses looks after them itself.
    """

    def __init__(self, ranks: Ranks, module: PipelineModule, mesh: PipelineMesh, gradients: bool) -> None:
        self._ranks, self._module, self._mesh, self._gradients = ranks, module, mesh, gradients
        self._records: list[Record] = []
        self._losses: Tensor | None = None
        self.failed = False

    def begin(self) -> None:
        """Begin an optimizer step."""
        self._records.clear()
        self._losses, self.failed = None, False

    def end(self, failed: bool) -> None:
        """End an optimizer step, with the value of `flag`."""
        self.failed = failed
        if not failed:
            self._records.clear()

    def record(self, batch: Batch, numbers: Sequence[int], stages: int) -> Record:
        """A record for the next batch of the step."""
        self._records.append(Record(batch, numbers, stages))
        return self._records[-1]

    def gradients(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """How many types of parameters have gradients on this rank that are not finite, or too large for the type.
        Types count once for each device."""
        found = torch.zeros((), device=self._mesh.device)
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters if self._gradients else ():
            if parameter.grad is not None and local(parameter.grad).numel():
                by_type.setdefault(parameter.dtype, []).append(local(parameter.grad))
        for dtype, gradients in by_type.items():
            for some in by_device(gradients):
                largest = nn.utils.get_total_norm(some, float("inf"))  # a 2-norm of finite numbers may overflow
                found += ~(largest <= torch.finfo(dtype).max).to(found.device)
        return found

    def flag(self, sums: Tensor, gradients: Tensor) -> Tensor:
        """1 if the step is not finite up to now, else 0, on the device.

        Args:
            sums: the loss sums of a batch, over all ranks.
            gradients: the sum of `gradients` over all ranks.
        """
        losses = (~torch.isfinite(sums)).sum()
        self._losses = losses if self._losses is None else self._losses + losses
        return (self._losses + gradients > 0).to(torch.int32)

    def explain(self) -> str:
        """Where it began, by the findings of all ranks. Collective; the host waits for the device."""
        found = [finding for b, record in enumerate(self._records) for finding in record.findings(b)]
        found += self._parameters()
        everyone = self._ranks.exchange(found)()[0]
        listed = sorted((finding, rank) for rank, row in enumerate(everyone) for finding in row)
        if not listed:
            return "no tensor is left that shows where"
        first = listed[0][0][:2]
        causes: dict[Finding, int] = {}
        for finding, rank in listed:
            if finding[:2] == first:
                causes.setdefault(finding, rank)
        several = range(len(self._records) if len(self._records) > 1 else 0)
        lines = [
            f"{finding.text}{f', batch {finding.batch} of the step' if finding.batch in several else ''} (rank {rank})"
            for finding, rank in causes.items()
        ]
        more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        return "\n  ".join(["it began here:", *lines[:SHOWN]]) + more

    def _parameters(self) -> list[Finding]:
        found: list[Finding] = []
        for name, parameter in self._module.named_parameters():
            if not bool(torch.isfinite(local(parameter.detach())).all()):
                found.append(Finding(-1, 0, -1, f"the weights {name} are not finite"))
            gradient = parameter.grad
            if gradient is not None and not bool(torch.isfinite(local(gradient)).all()):
                found.append(Finding(len(self._records), 0, -1, f"the gradient of {name}, and in no forward"))
        return found
