"""A flow-matching diffusion transformer (MMDiT) as a `Generator`, conditioned on the LLM's final hidden states.

It is trained by rectified flow as in Stable Diffusion 3 (arXiv 2403.03206): x_s = (1 - s) * x_0 + s * noise, the
network predicts noise - x_0, and s is drawn logit-normally. Targets may be pixels or latents. Everything random about
an item comes from its own seed, so results depend neither on how items are batched nor on the rank that runs them.

Shape suffixes: B items, C channels, H and W pixels (or latent cells), N condition rows, D width of the LLM, E width of
the conditions inside the transformer, K queries.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from bigmac_lightning.checkpoints.fetching import local_folder
from bigmac_lightning.contracts.batch import TargetItem
from bigmac_lightning.contracts.components import Generator
from bigmac_lightning.estimates.forward_cost import ForwardCost, forward_cost

from ..folders import has_safetensors, reading_weights
from ..initialization import frozen_as, seeded
from ..rows import DrawnAgainError, constructed, cut_rows, read_rows
from .codec import LatentCodec
from .velocity import TRANSFORMERS


class FlowGenerator(Generator):
    """A diffusion transformer behind a connector, for pixels or for the latents of a frozen codec.

    Attributes:
        connector: maps from the LLM's width to the transformer's conditions.
        transformer: predicts the velocity of the flow.
        codec: makes latents of pictures and pictures of latents; ``None``: the flow works on pictures.
    """

    def __init__(
        self,
        width: int,
        channels: int = 3,
        patch_size: int = 2,
        config: dict[str, Any] | None = None,
        steps: int = 20,
        shift: float = 1.0,
        condition_dropout: float = 0.0,
        guidance_scale: float = 1.0,
        seed: int = 0,
        transformer: str = "qwen_image",
        weights: str | None = None,
        codec: LatentCodec | None = None,
        queries: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        """
        Args:
            width: the width of the LLM, D.
            channels: the channels of the targets, C; a codec brings its own number.
            patch_size: the side of the square patches that are the transformer's tokens.
            config: arguments of the transformer's class: `num_layers`, `num_attention_heads`, `attention_head_dim`,
                for "qwen_image" `axes_dims_rope` (three even numbers that sum to `attention_head_dim`), ...
            steps: the number of Euler steps in which a sample is made.
            shift: if it is above 1, samples spend more of their steps at high noise.
            condition_dropout: the fraction of items that are trained without their conditions; guidance needs it.
            guidance_scale: the scale of classifier-free guidance (arXiv 2207.12598) of samples; 1: no guidance.
            seed: the seed of the initial weights.
            transformer: "qwen_image", "sd3", "sana" or "lumina2".
            weights: the folder of a pretrained transformer, whose config is used as well; ``None``: initial weights.
            codec: makes latents of targets and pictures of samples.
            queries: the number of learnable queries that gather the conditions, so that any number of rows becomes this
                many; ``None``: a linear layer maps each row.
            gradient_checkpointing: whether to save only each block's input for the backward and run the block again.

        Raises:
            ValueError: the arguments do not go together.
        """
        super().__init__()
        if guidance_scale != 1.0 and condition_dropout == 0.0:
            raise ValueError("guidance_scale needs a model trained without conditions at times: set condition_dropout")
        if transformer not in TRANSFORMERS:
            raise ValueError(f"transformer={transformer!r} is not known; choose one of {', '.join(TRANSFORMERS)}")
        self.kind, self.source, self.codec = TRANSFORMERS[transformer], weights, codec
        self.gradient_checkpointing, self.patch_size = gradient_checkpointing, patch_size
        self.steps, self.shift = steps, shift
        self.condition_dropout, self.guidance_scale = condition_dropout, guidance_scale
        channels = channels if codec is None else codec.channels
        if weights is None:
            self._arguments = self.kind.arguments(width, channels, patch_size, config or {})
        elif config is None:
            self._arguments = dict(self.kind.model.load_config(local_folder(weights)))
        else:
            raise ValueError("give config or weights: the folder of pretrained weights has a config of its own")
        self.seed, self.width, self.queries = seed, width, queries
        with torch.device("meta"):
            self.connector = self._new_connector()
            self.transformer: Any = self.kind.model.from_config(self._arguments)
        self._freeze_unused()

    def _new_connector(self) -> nn.Module:
        linear = nn.Linear(self.width, self._arguments[self.kind.condition_width])
        return linear if self.queries is None else QueryConnector(linear, self.queries)

    def materialize(self) -> None:
        if self.codec is not None:
            self.codec.materialize()
        if not next(self.transformer.parameters()).is_meta:
            return
        try:
            connector, transformer = self._with_weights(in_rows=self.shard_mesh is not None)
        except DrawnAgainError:  # then all weights are drawn before any is cut
            connector, transformer = self._with_weights(in_rows=False)
            assert self.shard_mesh is not None
            cut_rows(transformer, self.shard_mesh)
        self.connector = frozen_as(self.connector, connector)
        self.transformer = frozen_as(self.transformer, transformer)
        if self.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()

    def _with_weights(self, in_rows: bool) -> tuple[nn.Module, Any]:
        """The connector and the transformer.

        Args:
            in_rows: whether this rank makes only its rows of the transformer's weights.
        """
        mesh = self.shard_mesh if in_rows else None
        build = partial(self.kind.model.from_config, self._arguments)
        with seeded(self.seed, "generator"):
            connector = self._new_connector()
            if self.source is None:
                return connector, build() if mesh is None else constructed(build, mesh)
        with reading_weights(self.source, self.kind.model.__name__) as folder:
            rows = None if mesh is None else read_rows(build, folder, mesh)
            load, safe = self.kind.model.from_pretrained, has_safetensors(folder)
            arguments = {"torch_dtype": torch.float32, "local_files_only": True, "use_safetensors": safe}
            return connector, (rows or load(folder, **arguments)).train()

    def forward_cost(self, shape: tuple[int, ...], rows: int) -> ForwardCost:
        """The cost without the codec, which is small and has no backward."""
        *_, height, width = shape if self.codec is None else self.codec.latent_shape(shape)
        patches, conditions = height * width // self.patch_size**2, self.queries or rows
        cost = self.kind.cost(self.transformer, patches, conditions)
        if self.gradient_checkpointing:
            cost = cost.checkpointed(*self.kind.depth_and_width(self.transformer), patches + conditions)
        return forward_cost(self.connector, rows) + cost

    def _freeze_unused(self) -> None:
        """Freeze the modules that only make the last block's output for the conditions. It goes nowhere, so they would
        get no gradient, and ddp needs one for every trained weight."""
        if self.kind.unused:
            for name, module in self.transformer.transformer_blocks[-1].named_modules():
                if name in self.kind.unused:
                    module.requires_grad_(False)

    def batches(self, items: Sequence[TargetItem]) -> list[list[int]]:
        """Items of the same shape and number of condition rows are computed together."""
        alike: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for i, item in enumerate(items):
            alike.setdefault((tuple(item.shape), item.rows), []).append(i)
        return list(alike.values())

    def smallest(self) -> tuple[Tensor, TargetItem]:
        side, channels = self.patch_size, self._arguments.get("out_channels") or self._arguments["in_channels"]
        if self.codec is not None:
            side, channels = side * self.codec.factor, self.codec.autoencoder.config.in_channels
        dtype, shape = self.input_dtype(), (channels, side, side)
        item = TargetItem("", 1, shape, data=torch.zeros(shape, dtype=dtype))
        return torch.zeros(1, self.width, dtype=dtype), item

    def forward(self, conditions: list[Tensor], items: list[TargetItem]) -> Tensor:
        losses: list[Tensor] = []
        for indices in self.batches(items):
            draws = [Draw(items[i].seed, self._shape(items[i])) for i in indices]
            x_BCHW = torch.stack([_data(items[i]) for i in indices])
            x_BCHW = x_BCHW if self.codec is None else self.codec.encode(x_BCHW)
            s_B = torch.stack([draw.time for draw in draws]).to(x_BCHW)
            noise_BCHW = torch.stack([draw.noise for draw in draws]).to(x_BCHW)
            has_conditions_B = torch.stack([draw.uniform >= self.condition_dropout for draw in draws])
            conditions_BNE = self._connect([conditions[i] for i in indices])
            conditions_BNE = conditions_BNE * has_conditions_B.to(conditions_BNE)[:, None, None]
            s_B111 = s_B[:, None, None, None]
            velocity_BCHW = self._velocity((1 - s_B111) * x_BCHW + s_B111 * noise_BCHW, s_B, conditions_BNE)
            error_BCHW = velocity_BCHW.float() - (noise_BCHW - x_BCHW).float()
            losses.append(error_BCHW.square().flatten(1).mean(1).sum())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def sample(self, conditions: list[Tensor], items: list[TargetItem]) -> list[Tensor]:
        made: dict[int, Tensor] = {}
        for indices in self.batches(items):
            conditions_BNE = self._connect([conditions[i] for i in indices])
            x_BCHW = torch.stack([Draw(items[i].seed, self._shape(items[i])).noise for i in indices]).to(
                conditions_BNE.device
            )
            scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=self.shift)
            scheduler.set_timesteps(self.steps, device=x_BCHW.device)
            for time in scheduler.timesteps:
                s_B = (time / scheduler.config.num_train_timesteps).expand(len(indices))
                velocity_BCHW = self._velocity(x_BCHW, s_B, conditions_BNE)
                if self.guidance_scale != 1.0:
                    free_BCHW = self._velocity(x_BCHW, s_B, torch.zeros_like(conditions_BNE))
                    velocity_BCHW = free_BCHW + self.guidance_scale * (velocity_BCHW - free_BCHW)
                x_BCHW = scheduler.step(velocity_BCHW.float(), time, x_BCHW).prev_sample
            x_BCHW = x_BCHW if self.codec is None else self.codec.decode(x_BCHW)
            made.update(zip(indices, x_BCHW.unbind(), strict=True))
        return [made[i] for i in range(len(items))]

    def _connect(self, conditions: list[Tensor]) -> Tensor:
        return self.connector(torch.stack(conditions))

    def _velocity(self, x_BCHW: Tensor, s_B: Tensor, conditions_BNE: Tensor) -> Tensor:
        return self.kind.velocity(self.transformer, x_BCHW, s_B, conditions_BNE)

    def _shape(self, item: TargetItem) -> tuple[int, ...]:
        """The shape of an item's target, or of its latents."""
        return item.shape if self.codec is None else self.codec.latent_shape(item.shape)


class QueryConnector(nn.Module):
    """Learnable queries that attend to all condition rows, as in MetaQueries (arXiv 2504.06256)."""

    def __init__(self, linear: nn.Linear, queries: int, heads: int = 1) -> None:
        """
        Args:
            linear: a layer from D to E.
            queries: the number of queries, K.
            heads: the number of attention heads.
        """
        super().__init__()
        width = linear.out_features
        self.linear = linear
        self.queries_KE = nn.Parameter(torch.randn(queries, width) * width**-0.5)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, rows_BND: Tensor) -> Tensor:
        """conditions_BKE"""
        rows_BNE = self.linear(rows_BND)
        queries_BKE = self.queries_KE.expand(len(rows_BNE), -1, -1)
        found_BKE, _ = self.attention(queries_BKE, rows_BNE, rows_BNE, need_weights=False)
        return self.norm(queries_BKE + found_BKE)


class Draw:
    """The random numbers of an item, which are always drawn on the CPU and in the same order.

    Attributes:
        noise: a tensor of the shape of the target, or of its latents.
        time: s in (0, 1), logit-normal.
        uniform: a number in [0, 1); if it is below the dropout rate, the item loses its conditions.
    """

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(shape, generator=generator)
        self.time = torch.randn((), generator=generator).sigmoid()
        self.uniform = torch.rand((), generator=generator)


def _data(item: TargetItem) -> Tensor:
    if item.data is None:
        raise ValueError(f"a target of generator {item.generator!r} has no data on its owner, rank {item.owner}")
    return item.data
