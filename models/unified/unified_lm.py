"""The LightningModule of a model that reads and draws in one LLM."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from bigmac_lightning.contracts.batch import Batch, MediaItem, Microbatch, TargetItem
from bigmac_lightning.contracts.outputs import PipelineOutput

from ..generation.flow import Draw
from ..multimodal_lm import MultimodalLM
from .decoder import UnifiedDecoder
from .pictures import NoisyPictureEncoder, VelocityHead


class UnifiedLM(MultimodalLM):
    """A `MultimodalLM` whose LLM draws. It has a `UnifiedDecoder`, one `NoisyPictureEncoder` and one `VelocityHead`.

    Each target has a media item of that encoder, at the same tokens, in the same order, and with the same picture. Its
    noise is that of the target. Encoding noisy pictures, and the losses of velocities, are nested work; the flow itself
    is the LLM's.

    A picture is drawn in steps, each of which is a forward of the whole LLM: that cannot be nested into anything.
    """

    def __init__(self, *arguments: Any, steps: int = 20, **options: Any) -> None:
        """
        Args:
            arguments, options: those of `MultimodalLM`.
            steps: the number of Euler steps in which a picture is drawn.

        Raises:
            ValueError: a component is missing.
        """
        super().__init__(*arguments, **options)
        self.steps = steps
        encoders = [name for name, part in self.encoders.items() if isinstance(part, NoisyPictureEncoder)]
        heads = [name for name, part in self.generators.items() if isinstance(part, VelocityHead)]
        found = (len(encoders), len(heads), len(self.generators))
        if not isinstance(self.llm, UnifiedDecoder) or found != (1, 1, 1):
            raise ValueError(
                "UnifiedLM needs a UnifiedDecoder, one NoisyPictureEncoder among its encoders, and a VelocityHead as "
                f"its only generator; it has {type(self.llm).__name__}, encoders {list(self.encoders)} and generators "
                f"{list(self.generators)}"
            )
        self._encoder, self._head = encoders[0], heads[0]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint.pop("hugging_face")  # there is no model of the library that it could be exported as

    def prepare(self, batch: Batch) -> Batch:
        """Gives the pictures that are learnt their noise, before they are moved to a device.

        Raises:
            ValueError: a microbatch has another number of such pictures than of targets, or of their tokens.
        """
        batch = super().prepare(batch)
        return batch.replace(microbatches=[self._learnt(m, number) for number, m in enumerate(batch.microbatches)])

    def _learnt(self, microbatch: Microbatch, number: int) -> Microbatch:
        """A microbatch whose pictures have their noise."""
        rows = [item.rows for item in microbatch.media if item.encoder == self._encoder]
        wanted = [target.rows for target in microbatch.targets]
        if rows != wanted:
            raise ValueError(
                f"microbatch {number}: pictures of encoder {self._encoder!r} have {rows} tokens, and targets {wanted}: "
                "each target needs such a picture, at the same tokens and in the same order"
            )
        left = iter(microbatch.targets)
        media = [self._with_noise(m, next(left)) if m.encoder == self._encoder else m for m in microbatch.media]
        return replace(microbatch, media=media)

    def _with_noise(self, item: MediaItem, target: TargetItem) -> MediaItem:
        if not isinstance(item.data, Tensor):  # of another rank, or it has noise already
            return item
        draw = Draw(target.seed, self._latent_shape(target))
        device = item.data.device
        return replace(item, data={"picture": item.data, "noise": draw.noise.to(device), "time": draw.time.to(device)})

    def _latent_shape(self, target: TargetItem) -> tuple[int, ...]:
        codec = self.head.codec
        return tuple(target.shape) if codec is None else codec.latent_shape(target.shape)

    @property
    def head(self) -> VelocityHead:
        found = self.generators[self._head]
        assert isinstance(found, VelocityHead)
        return found

    def pipeline(self, batch: Batch, sample: bool = False) -> PipelineOutput:
        return self._draw(batch) if sample else super().pipeline(batch)

    def _draw(self, batch: Batch) -> PipelineOutput:
        """Each target, drawn from the noise of its seed."""
        codec, device = self.head.codec, batch.labels.device
        x = [Draw(target.seed, self._latent_shape(target)).noise.to(device) for target in batch.targets]
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(self.steps, device=device)
        out = None
        for step, time in enumerate(scheduler.timesteps):
            s = time / scheduler.config.num_train_timesteps
            out = super().pipeline(self._with_noisy(batch, x, s), sample=True)
            assert out.samples is not None, "it samples"
            length = scheduler.sigmas[step + 1] - scheduler.sigmas[step]
            x = [one + length * velocity for one, velocity in zip(x, out.samples, strict=True)]
        assert out is not None, "there are steps"
        out.samples = x if codec is None else [codec.decode(one[None])[0].float() for one in x]
        return out

    def _with_noisy(self, batch: Batch, x: list[Tensor], s: Tensor) -> Batch:
        """The batch with the pictures as they are at s, on their owners."""
        left = iter(x)
        return batch.replace(microbatches=[self._noisy(m, left, s, batch) for m in batch.microbatches])

    def _noisy(self, microbatch: Microbatch, left: Iterator[Tensor], s: Tensor, batch: Batch) -> Microbatch:
        def given(item: MediaItem) -> MediaItem:
            if item.encoder != self._encoder:
                return item
            picture = next(left)
            return replace(item, data={"noisy": picture, "time": s} if batch.layout.owns(item) else None)

        return replace(microbatch, media=[given(item) for item in microbatch.media])
