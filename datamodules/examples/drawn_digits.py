"""The digits of `DigitsDataModule` for a model that draws in its LLM (`UnifiedLM`): a picture that is drawn has a token
for each of its patches, and comes in with noise.

The samples are the same, but for the drawings:

    text to image     draw a 7 : <draw> x 16                (a token for each patch)
"""

from dataclasses import replace

import torch

from bigmac_lightning.contracts.batch import Batch, MediaItem

from ..example import Example
from ..loading.collate import Media, Sample
from .digits import Digits, DigitsDataModule


class DrawnDigits(Digits):
    """Digits whose drawings come in with noise."""

    def draw(self, digit: int, request: str, seed: int, index: int | None = None) -> Sample:
        sample = super().draw(digit, request, seed, index)
        (target,) = sample.targets
        return replace(sample, media=[Media("drawn", target.start, target.rows, target.load)])


class DrawnDigitsDataModule(DigitsDataModule):
    """`DigitsDataModule`, whose `draw_rows` are the patches of a picture: (8 / patch size) squared."""

    kind = DrawnDigits

    def prompt(self, example: Example) -> Batch:
        batch = super().prompt(example)
        (microbatch,) = batch.microbatches
        microbatch.media += [MediaItem("drawn", target.rows) for target in microbatch.targets]
        microbatch.media_positions = torch.cat([microbatch.media_positions, microbatch.target_positions])
        return batch
