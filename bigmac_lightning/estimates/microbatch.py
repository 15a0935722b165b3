"""The microbatch that estimates are made for: how many tokens, media items and targets it holds, without contents."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bigmac_lightning.contracts.batch import (
    Batch,
    MediaItem,
    Microbatch,
    PipelineLayout,
    TargetItem,
)
from bigmac_lightning.contracts.owners import assign_owners


@dataclass(frozen=True)
class TypicalMicrobatch:
    """The contents that every microbatch of a step is assumed to have.

    Attributes:
        tokens: tokens of the LLM; all of them are labelled.
        media_rows: those tokens that features of encoders replace.
        item_rows: the feature rows of one media item; the last item of a microbatch may have fewer.
        targets: the number of generator targets.
        target_rows: the condition rows of one target.
        target_shape: the shape of one target.
    """

    tokens: int = 4096
    media_rows: int = 0
    item_rows: int = 256
    targets: int = 0
    target_rows: int = 64
    target_shape: tuple[int, ...] = (3, 512, 512)

    @classmethod
    def of_data(cls, amounts: Mapping[str, Any], encoders: bool, generators: bool) -> "TypicalMicrobatch":
        """The microbatch of data, of which some amounts are known.

        Args:
            amounts: tokens, item_rows, target_rows and target_shape; those that are ``None`` or missing are not known.
            encoders, generators: whether the model has any. A quarter of the tokens is then media, and there is one
                target.
        """
        default, known = cls(), {name: amount for name, amount in amounts.items() if amount is not None}
        tokens = known.get("tokens", default.tokens)
        return cls(
            tokens=tokens,
            media_rows=tokens // 4 if encoders else 0,
            item_rows=known.get("item_rows", min(default.item_rows, tokens // 4 or 1)),
            targets=1 if generators else 0,
            target_rows=known.get("target_rows", default.target_rows),
            target_shape=tuple(known.get("target_shape", default.target_shape)),
        )

    @classmethod
    def mean(cls, batch: Batch) -> "TypicalMicrobatch":
        """The mean microbatch of a batch, rounded up. Targets have the shape of the first one."""
        media = [item for microbatch in batch.microbatches for item in microbatch.media]
        amounts = {
            "tokens": batch.tokens,
            "media_rows": sum(item.rows for item in media),
            "targets": len(batch.targets),
        }
        made: dict[str, Any] = {name: math.ceil(amount / len(batch)) for name, amount in amounts.items()}
        if media:
            made["item_rows"] = math.ceil(amounts["media_rows"] / len(media))
        if batch.targets:
            made["target_rows"] = math.ceil(sum(item.rows for item in batch.targets) / len(batch.targets))
            made["target_shape"] = batch.targets[0].shape
        return cls(**made)

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("media_rows", 0), ("item_rows", 1), ("targets", 0), ("target_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"microbatch.{name} is {getattr(self, name)}; expected at least {least}")

    def __str__(self) -> str:
        media = f", {self.media_rows} of them of media, {self.item_rows} each" if self.media_rows else ""
        targets = f", {self.targets} targets of {list(self.target_shape)}" if self.targets else ""
        return f"{self.tokens} tokens{media}{targets}"

    @property
    def items(self) -> int:
        """The number of media items."""
        return -(-self.media_rows // self.item_rows)

    def batch(self, microbatches: int, layout: PipelineLayout, encoder: str = "", generator: str = "") -> Batch:
        """A batch of such microbatches, from which a plan can be made but which cannot run.

        Args:
            encoder, generator: the names of those that all items and targets belong to; "": there are none.
        """
        one = torch.zeros(1, dtype=torch.long)
        made = [
            Microbatch(
                {"input_ids": torch.empty(1, self.tokens, device="meta")},
                label_positions=one,
                labels=one,
                media=[MediaItem(encoder, self.item_rows) for _ in range(self.items)] if encoder else [],
                targets=[
                    TargetItem(generator, self.target_rows, self.target_shape)
                    for _ in range(self.targets if generator else 0)
                ],
            )
            for _ in range(microbatches)
        ]
        assign_owners(made, layout)
        return Batch(made, layout)
