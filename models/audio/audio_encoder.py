"""An audio tower with a projector as an `Encoder`, which turns sounds into rows of the LLM's width.

Shape suffixes: W windows of all sounds, M bands of the spectrogram, T columns of it in a window, F frames of a window,
E width of the tower.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from bigmac_lightning.estimates.forward_cost import ForwardCost, attention_cost, forward_cost

from ..initialization import to_config
from ..llm import attention
from ..projected_tower import ProjectedTower

STRIDE = 2
"""Columns of the spectrogram in a frame: the second convolution of Whisper's encoder has this stride."""

TOWERS = ("whisper",)


class AudioEncoder(ProjectedTower):
    """The encoder of Whisper, then a linear layer or a two-layer perceptron. Between the two, neighbouring frames may
    be joined.

    A sound is ``{"windows": (windows, bands, columns), "frames": (frames,)}``, as `AudioProcessor` makes it: the
    log-mel spectrograms of its windows, and the numbers of the tower's frames that are used, of all windows one after
    another. It becomes one row of every `merge` of these frames.

    Attributes:
        tower: Whisper without its decoder. All windows have the length that its config has positions for.
    """

    def __init__(
        self,
        config: dict[str, Any] | str | PreTrainedConfig,
        width: int,
        projector_hidden: int | None = None,
        merge: int = 1,
        seed: int = 0,
        attn_implementation: str = "sdpa",
        weights: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        """
        Args:
            config: ``{"model_type": "whisper", "d_model": 64, "max_source_positions": 100, ...}``; or the folder or
                name of a pretrained model, of which only the config is read; or a ready config.
            width: the width of the LLM, D.
            merge: the number of neighbouring frames that are joined into one row.
            projector_hidden, seed, attn_implementation, weights, gradient_checkpointing: see `VisionEncoder`.

        Raises:
            ValueError: the tower is not supported, or the attention implementation is not installed.
        """
        super().__init__()
        self.config = copy.deepcopy(to_config(config))
        if self.config.model_type not in TOWERS:
            raise ValueError(
                f"AudioEncoder supports the towers {sorted(TOWERS)}, not model_type {self.config.model_type!r}; for "
                "another tower write an Encoder of your own"
            )
        if merge < 1 or self.config.max_source_positions % merge:
            raise ValueError(f"merge={merge} must divide max_source_positions={self.config.max_source_positions}")
        self.config.encoder_layerdrop = 0.0  # it would drop other layers on each rank
        self.config.decoder_layers = 0  # the decoder is left out
        self.merge = merge
        further = (seed, attn_implementation, weights, gradient_checkpointing)
        self._build(self.config.d_model * merge, width, projector_hidden, *further)

    def _keep(self, tower: Any) -> None:
        if hasattr(tower, "decoder"):
            del tower.decoder

    def forward_cost(self, rows: int) -> ForwardCost:
        """The cost for a sound of so many rows, whose last window is computed as a whole."""
        config = self.config
        frames = config.max_source_positions
        windows = -(-rows * self.merge // frames)
        window = forward_cost(self.tower, lambda name: frames * (STRIDE if "conv1" in name else 1))
        window += attention_cost(config.d_model, frames, frames) * config.encoder_layers
        if self.gradient_checkpointing:
            window = window.checkpointed(config.encoder_layers, config.d_model, frames)
        return window * windows + forward_cost(self.projector, rows)

    def forward(self, pixels: list[Mapping[str, Tensor]]) -> Tensor:
        attention.check_device(self.config._attn_implementation, pixels[0]["windows"].device)
        windows_WMT = torch.cat([sound["windows"] for sound in pixels])
        frames_WFE = self.tower.encoder(windows_WMT).last_hidden_state
        rows, first = list[Tensor](), 0
        for sound in pixels:
            own = frames_WFE[first : first + len(sound["windows"])].flatten(0, 1)
            rows.append(own[sound["frames"]].unflatten(0, (-1, self.merge)).flatten(1))
            first += len(sound["windows"])
        return self.projector(torch.cat(rows))

    def smallest(self) -> dict[str, Tensor]:
        config = self.config
        columns = config.max_source_positions * STRIDE
        windows = torch.zeros(1, config.num_mel_bins, columns, dtype=self.input_dtype())
        return {"windows": windows, "frames": torch.arange(self.merge)}
