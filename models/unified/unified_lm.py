"""The LightningModule of a model that reads and draws in one LLM."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from bigmac_lightning.contracts.batch import Batch, MediaItem, Microbatch, TargetItem
from bigmac_lightning.contracts.component_module import EncoderCall, GeneratorCall
from bigmac_lightning.contracts.growing_text import GrowingText
from bigmac_lightning.contracts.outputs import PipelineOutput
from bigmac_lightning.contracts.precision import weight_dtype

from ..generation.flow import Draw
from ..multimodal_lm import MultimodalLM
from .decoder import UnifiedDecoder
from .kept_keys import drawings_alone, numbered
from .masks import ALONE
from .pictures import NoisyPictureEncoder, VelocityHead
from .shared_latents import LearntPicture, linked, with_latents


class UnifiedLM(MultimodalLM):
    """A `MultimodalLM` whose LLM draws. It has a `UnifiedDecoder`, one `NoisyPictureEncoder` and one `VelocityHead`.

    Each target has a media item of that encoder, at the same tokens, in the same order, and with the same picture. Its
    noise is that of the target. Encoding noisy pictures, and the losses of velocities, are nested work; the flow itself
    is the LLM's.

    A picture is drawn in steps, each of which is a forward of the LLM, after the first one on the tokens of pictures
    alone: that cannot be nested into anything.
    """

    def __init__(
        self,
        *arguments: Any,
        steps: int = 20,
        condition_dropout: float = 0.0,
        guidance_scale: float = 1.0,
        **options: Any,
    ) -> None:
        """
        Args:
            arguments, options: those of `MultimodalLM`.
            steps: the number of Euler steps in which a picture is drawn.
            condition_dropout: the fraction of targets whose tokens see nothing but each other; guidance needs it.
            guidance_scale: the scale of classifier-free guidance (arXiv 2207.12598) of drawings; 1: no guidance. Each
                step takes a second forward with it.

        Raises:
            ValueError: a component is missing, or the numbers do not go together.
        """
        super().__init__(*arguments, **options)
        if not 0.0 <= condition_dropout < 1.0:
            raise ValueError(f"condition_dropout={condition_dropout}: it is a fraction, at least 0 and below 1")
        if guidance_scale != 1.0 and condition_dropout == 0.0:
            raise ValueError("guidance_scale needs a model trained without conditions at times: set condition_dropout")
        self.steps, self.condition_dropout, self.guidance_scale = steps, condition_dropout, guidance_scale
        encoders = [name for name, part in self.encoders.items() if isinstance(part, NoisyPictureEncoder)]
        heads = [name for name, part in self.generators.items() if isinstance(part, VelocityHead)]
        found = (len(encoders), len(heads), len(self.generators))
        if not isinstance(self.llm, UnifiedDecoder) or found != (1, 1, 1):
            raise ValueError(
                "UnifiedLM needs a UnifiedDecoder, one NoisyPictureEncoder among its encoders, and a VelocityHead as "
                f"its only generator; it has {type(self.llm).__name__}, encoders {list(self.encoders)} and generators "
                f"{list(self.generators)}"
            )
        self._encoder, self._head, self._writes = encoders[0], heads[0], False
        codecs = self._noisy_pictures.codec, self.head.codec
        one, other = (None if codec is None else codec.weights for codec in codecs)
        if one != other:
            raise ValueError(
                f"encoders.{self._encoder} and generators.{self._head} need the same codec, with the same weights: the "
                "velocity is that of the latents that were given noise. Give both the same config and seed, or none"
            )

    def prepare(self, batch: Batch) -> Batch:
        """Gives the pictures that are learnt their noise, before they are moved to a device, and says which of them
        have no condition.

        Raises:
            ValueError: a microbatch has another number of such pictures than of targets, or of their tokens.
        """
        batch = super().prepare(batch)
        return batch.replace(microbatches=[self._learnt(m, number) for number, m in enumerate(batch.microbatches)])

    def _learnt(self, microbatch: Microbatch, number: int) -> Microbatch:
        """A microbatch whose pictures have their noise, and some no condition."""
        rows = [item.rows for item in microbatch.media if item.encoder == self._encoder]
        wanted = [target.rows for target in microbatch.targets]
        if rows != wanted:
            raise ValueError(
                f"microbatch {number}: pictures of encoder {self._encoder!r} have {rows} tokens, and targets {wanted}: "
                "each target needs such a picture, at the same tokens and in the same order"
            )
        left, media, targets = iter(microbatch.targets), list[MediaItem](), list[TargetItem]()
        for item in microbatch.media:
            if item.encoder == self._encoder:
                item, target = self._with_noise(item, next(left))
                targets.append(target)
            media.append(item)
        if self.condition_dropout and ALONE not in microbatch.inputs:
            alone = [loses_condition(target, self.condition_dropout) for target in targets]
            microbatch = _alone(microbatch, alone)
        return replace(microbatch, media=media, targets=targets)

    def _with_noise(self, item: MediaItem, target: TargetItem) -> tuple[MediaItem, TargetItem]:
        picture = item.data
        if not isinstance(picture, Tensor):  # of another rank, or it has noise already
            return item, target
        draw, device = Draw(target.seed, self._latent_shape(target)), picture.device
        noisy = replace(item, data={"picture": picture, "noise": draw.noise.to(device), "time": draw.time.to(device)})
        return linked(noisy, target) if target.data is picture and self._same_codec else (noisy, target)

    @property
    def _same_codec(self) -> bool:
        """Whether encoder and head make equal latents of a picture, by a codec."""
        one, other = self._noisy_pictures.codec, self.head.codec
        return one is not None and other is not None and weight_dtype(one) == weight_dtype(other)

    def encode(
        self, items: Sequence[MediaItem], names: Collection[str] = (), call: EncoderCall | None = None
    ) -> list[Tensor]:
        if self._writes:
            return self._encode_for_text(items, {*names} - {self._encoder}, call)
        encoder = self._noisy_pictures
        encoder.made.clear()
        features = super().encode(items, names, call)
        pictures = [item for item in items if item.encoder == self._encoder]
        # None are made of pictures that are being drawn, and some of an item that stands for none.
        for item, latents in zip(pictures, encoder.made, strict=False):
            if isinstance(item, LearntPicture) and item.latents is not None:
                item.latents.give(latents)
        encoder.made.clear()
        return features

    def _encode_for_text(
        self, items: Sequence[MediaItem], names: Collection[str], call: EncoderCall | None
    ) -> list[Tensor]:
        """Features, which are zeros of pictures that were drawn: no text sees them."""
        others = [item for item in items if item.encoder != self._encoder]
        made = iter(super().encode(others, names, call))
        features = [
            torch.zeros(item.rows, self.llm.width, device=self.device) if item.encoder == self._encoder else next(made)
            for item in items
        ]
        return [*features, *made]

    def write(self, texts: Sequence[GrowingText], choose: Callable[[int, Tensor], int]) -> list[int]:
        self._writes = True
        try:
            return super().write(texts, choose)
        finally:
            self._writes = False

    def generate(
        self,
        conditions: list[Tensor],
        items: Sequence[TargetItem],
        names: Collection[str] = (),
        call: GeneratorCall[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        known = [with_latents(item) for item in items]
        if self._head not in names:  # ranks that gather the weights of its codec together run it equally often
            items = known
        return super().generate(conditions, items, names, call)

    def _latent_shape(self, target: TargetItem) -> tuple[int, ...]:
        codec = self.head.codec
        return tuple(target.shape) if codec is None else codec.latent_shape(target.shape)

    @property
    def head(self) -> VelocityHead:
        found = self.generators[self._head]
        assert isinstance(found, VelocityHead)
        return found

    @property
    def _noisy_pictures(self) -> NoisyPictureEncoder:
        found = self.encoders[self._encoder]
        assert isinstance(found, NoisyPictureEncoder)
        return found

    @property
    def _decoder(self) -> UnifiedDecoder:
        assert isinstance(self.llm, UnifiedDecoder)
        return self.llm

    def pipeline(self, batch: Batch, sample: bool = False) -> PipelineOutput:
        return self._draw(batch) if sample else super().pipeline(batch)

    @torch.no_grad()
    def _draw(self, batch: Batch) -> PipelineOutput:
        """Each target, drawn from the noise of its seed."""
        codec, device, scale = self.head.codec, batch.labels.device, self.guidance_scale
        x = [Draw(target.seed, self._latent_shape(target)).noise.to(device) for target in batch.targets]
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(self.steps, device=device)
        whole = self.prepare(batch)
        whole = whole.replace(microbatches=[numbered(m, number) for number, m in enumerate(whole.microbatches)])
        out = None
        with self._decoder.keeping_keys() as keeps, self._drawing_encoder():
            for step, time in enumerate(scheduler.timesteps if x else scheduler.timesteps[:1]):
                s = time / scheduler.config.num_train_timesteps
                found = super().pipeline(self._noisy(whole, x, s, whole=not (keeps and out)), sample=True)
                velocities, out = found.samples or [], out or found
                if scale != 1.0 and x:
                    free = super().pipeline(self._noisy(whole, x, s, whole=not keeps, alone=True), sample=True).samples
                    velocities = [one + scale * (v - one) for one, v in zip(free or [], velocities, strict=True)]
                length = scheduler.sigmas[step + 1] - scheduler.sigmas[step]
                x = [one + length * velocity for one, velocity in zip(x, velocities, strict=True)]
        assert out is not None, "there are steps"
        self.last_metrics = out.metrics
        out.samples = x if codec is None else self.head.decode(x)
        return out

    @contextmanager
    def _drawing_encoder(self) -> Iterator[None]:
        encoder = self._noisy_pictures
        encoder.draws = True
        try:
            yield
        finally:
            encoder.draws = False

    def _noisy(self, batch: Batch, x: list[Tensor], s: Tensor, whole: bool, alone: bool = False) -> Batch:
        """The batch with the pictures as they are at s, on their owners.

        Args:
            whole: whether it has all tokens, and not those of pictures alone.
            alone: whether pictures have no condition.
        """
        left, made = iter(x), list[Microbatch]()
        for microbatch in batch.microbatches:
            media = [self._as_noisy(item, left, s, batch) for item in microbatch.media]
            targets = [replace(target, shape=self._latent_shape(target)) for target in microbatch.targets]
            if whole:
                given = replace(microbatch, media=media, targets=targets)
                # in training some have none
                made.append(_alone(given, [alone] * len(given.targets)) if self.condition_dropout else given)
            elif microbatch.targets:
                drawn = [item for item in media if item.encoder == self._encoder]
                made.append(replace(drawings_alone(microbatch, drawn, alone), targets=targets))
        return batch.replace(microbatches=made)

    def _as_noisy(self, item: MediaItem, left: Iterator[Tensor], s: Tensor, batch: Batch) -> MediaItem:
        if item.encoder != self._encoder:
            return item
        picture = next(left)
        return replace(item, data={"noisy": picture, "time": s} if batch.layout.owns(item) else None)


def loses_condition(target: TargetItem, dropout: float) -> bool:
    """Whether a target is learnt without its condition, the same on all ranks."""
    return Random(f"condition of {target.seed}").random() < dropout


def _alone(microbatch: Microbatch, alone: list[bool]) -> Microbatch:
    """A microbatch of whose targets some have no condition."""
    found_N = torch.tensor(alone, dtype=torch.bool).repeat_interleave(
        torch.tensor([target.rows for target in microbatch.targets], dtype=torch.long)
    )
    ids_BS, positions = microbatch.inputs["input_ids"], microbatch.target_positions
    alone_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    alone_BS.view(-1)[positions] = found_N.to(ids_BS.device)
    return replace(microbatch, inputs={**microbatch.inputs, ALONE: alone_BS})
