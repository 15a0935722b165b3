"""A flow-matching diffusion transformer (MMDiT) as a `Generator`, conditioned on the LLM's final hidden states.

Rectified flow as in Stable Diffusion 3 (arXiv 2403.03206): x_s = (1 - s) * x_0 + s * noise, the network predicts
noise - x_0, and s is drawn logit-normally. Works on whatever the target is, pixels or latents. All that is random about
an item comes from its own seed, so results depend neither on how items are batched nor on who runs them.
Knows nothing of tokens, microbatches or ranks.

Shape suffixes: B items, C channels, H and W pixels (or latent cells), T patches of an item, N condition rows, D width
of the LLM, E width of the conditions inside the transformer.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from bigmac_lightning.batch import TargetItem
from bigmac_lightning.module import Generator

from .initialization import seeded


class FlowGenerator(Generator):
    """Qwen-Image's transformer behind a linear connector.

    Attributes:
        connector: from the LLM's width to the transformer's conditions.
        transformer: predicts the velocity of the flow.
    """

    def __init__(
        self,
        width: int,
        channels: int,
        patch_size: int = 2,
        config: dict[str, Any] | None = None,
        steps: int = 20,
        shift: float = 1.0,
        condition_dropout: float = 0.0,
        guidance_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        """
        Args:
            width: D, of the LLM.
            channels: C, of the targets.
            patch_size: side of the square patches that are the transformer's tokens.
            config: arguments of `QwenImageTransformer2DModel`: `num_layers`, `num_attention_heads`,
                `attention_head_dim`, `axes_dims_rope` (three even numbers that sum to `attention_head_dim`), ...
            steps: Euler steps of a sample.
            shift: above 1, samples spend more of their steps at high noise.
            condition_dropout: fraction of items trained without their conditions; needed for guidance.
            guidance_scale: classifier-free guidance of samples; 1: none.
            seed: of the initial weights.
        """
        super().__init__()
        if guidance_scale != 1.0 and condition_dropout == 0.0:
            raise ValueError("guidance_scale needs a model trained without conditions at times: set condition_dropout")
        config = dict(config or {})
        if "axes_dims_rope" in config:
            config["axes_dims_rope"] = tuple(config["axes_dims_rope"])
        condition_width = config.setdefault("joint_attention_dim", width)
        self.channels, self.patch_size = channels, patch_size
        self.steps, self.shift = steps, shift
        self.condition_dropout, self.guidance_scale = condition_dropout, guidance_scale
        patch = channels * patch_size**2
        with seeded(seed, "generator"):
            self.connector = nn.Linear(width, condition_width)
            self.transformer = QwenImageTransformer2DModel(
                patch_size=patch_size, in_channels=patch, out_channels=channels, **config
            )
        for unused in ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp"):
            # what the last block makes of the conditions goes nowhere; ddp wants a gradient for every trained weight
            self.transformer.transformer_blocks[-1].get_submodule(unused).requires_grad_(False)

    def forward(self, conditions: list[Tensor], items: list[TargetItem]) -> Tensor:
        losses: list[Tensor] = []
        for indices in _alike(items):
            draws = [_Draw(items[i]) for i in indices]
            x_BCHW = torch.stack([_data(items[i]) for i in indices])
            s_B = torch.stack([draw.time for draw in draws]).to(x_BCHW)
            noise_BCHW = torch.stack([draw.noise for draw in draws]).to(x_BCHW)
            kept_B = torch.stack([draw.uniform >= self.condition_dropout for draw in draws])
            conditions_BNE = self._connect([conditions[i] for i in indices])
            conditions_BNE = conditions_BNE * kept_B.to(conditions_BNE)[:, None, None]
            s_B111 = s_B[:, None, None, None]
            velocity_BCHW = self._velocity((1 - s_B111) * x_BCHW + s_B111 * noise_BCHW, s_B, conditions_BNE)
            error_BCHW = velocity_BCHW.float() - (noise_BCHW - x_BCHW).float()
            losses.append(error_BCHW.square().flatten(1).mean(1).sum())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def sample(self, conditions: list[Tensor], items: list[TargetItem]) -> list[Tensor]:
        made: dict[int, Tensor] = {}
        for indices in _alike(items):
            conditions_BNE = self._connect([conditions[i] for i in indices])
            x_BCHW = torch.stack([_Draw(items[i]).noise for i in indices]).to(conditions_BNE.device)
            scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=self.shift)
            scheduler.set_timesteps(self.steps, device=x_BCHW.device)
            for time in scheduler.timesteps:
                s_B = (time / scheduler.config.num_train_timesteps).expand(len(indices))
                velocity_BCHW = self._velocity(x_BCHW, s_B, conditions_BNE)
                if self.guidance_scale != 1.0:
                    free_BCHW = self._velocity(x_BCHW, s_B, torch.zeros_like(conditions_BNE))
                    velocity_BCHW = free_BCHW + self.guidance_scale * (velocity_BCHW - free_BCHW)
                x_BCHW = scheduler.step(velocity_BCHW.float(), time, x_BCHW).prev_sample
            made.update(zip(indices, x_BCHW.unbind(), strict=True))
        return [made[i] for i in range(len(items))]

    def _connect(self, conditions: list[Tensor]) -> Tensor:
        return self.connector(torch.stack(conditions))

    def _velocity(self, x_BCHW: Tensor, s_B: Tensor, conditions_BNE: Tensor) -> Tensor:
        p = self.patch_size
        height, width = x_BCHW.shape[2] // p, x_BCHW.shape[3] // p
        patches_BTE = x_BCHW.unflatten(3, (width, p)).unflatten(2, (height, p))
        patches_BTE = patches_BTE.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        shapes = [[(1, height, width)]] * len(x_BCHW)
        with torch.inference_mode(False):  # it caches tables on the device; a validation's must serve training
            self.transformer.pos_embed(shapes, max_txt_seq_len=conditions_BNE.shape[1], device=x_BCHW.device)
        patches_BTE = self.transformer(
            hidden_states=patches_BTE.to(conditions_BNE.dtype),
            encoder_hidden_states=conditions_BNE,
            timestep=s_B,
            img_shapes=shapes,
        ).sample
        grid = patches_BTE.unflatten(1, (height, width)).unflatten(3, (self.channels, p, p))
        return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class _Draw:
    """What is random about an item: always drawn on the CPU, in the same order.

    Attributes:
        noise: of the target's shape.
        time: s, in (0, 1), logit-normal.
        uniform: in [0, 1); below the dropout rate the item loses its conditions.
    """

    def __init__(self, item: TargetItem) -> None:
        generator = torch.Generator().manual_seed(item.seed)
        self.noise = torch.randn(item.shape, generator=generator)
        self.time = torch.randn((), generator=generator).sigmoid()
        self.uniform = torch.rand((), generator=generator)


def _alike(items: Iterable[TargetItem]) -> Iterator[list[int]]:
    """Positions of the items that can be batched: those of equal shape and number of condition rows."""
    groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault((tuple(item.shape), item.rows), []).append(i)
    yield from groups.values()


def _data(item: TargetItem) -> Tensor:
    if item.data is None:
        raise ValueError(f"a target of generator {item.generator!r} has no data on its owner, rank {item.owner}")
    return item.data
