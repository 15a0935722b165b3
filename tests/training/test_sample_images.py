"""SampleImages in a validation without a training; tests/cli/test_configs.py draws in trainings."""

from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from bigmac_lightning.callbacks import SampleImages
from bigmac_lightning.datamodules import DigitsDataModule
from bigmac_lightning.models import FlowGenerator, HFDecoder, MultimodalLM, VisionEncoder
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer

SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
LLM = {"model_type": "qwen3", **SIZE, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
TOWER = {"model_type": "siglip_vision_model", **SIZE, "image_size": 8, "patch_size": 2, "num_channels": 1}
FLOW = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6]}


def _validate(trainer: Any, folder: Path) -> None:
    module = MultimodalLM(
        HFDecoder(LLM),
        encoders={"image": VisionEncoder(TOWER, width=16)},
        generators={"image": FlowGenerator(width=16, channels=1, config=FLOW, steps=2)},
    )
    trainer.callbacks.append(SampleImages(every_n_epochs=2, dirpath=str(folder)))
    trainer.limit_val_batches = 1
    trainer.validate(module, DigitsDataModule(batch_size=8, microbatches=2, drawings=1), verbose=False)


def _on_rank(rank: int, folder: Path) -> None:
    _validate(pipeline_trainer(2, {}), folder)


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_draws_in_a_validation_alone(ranks: int, tmp_path: Path) -> None:
    if ranks == 1:
        _validate(plain_trainer(), tmp_path)
    else:
        on_ranks(ranks, _on_rank, tmp_path)
    with PIL.Image.open(tmp_path / "samples.png") as found:
        assert found.width > 64
