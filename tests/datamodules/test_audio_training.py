"""Sounds, images, videos and texts in the same packed microbatches, under pipelines against one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bigmac_lightning import ShardingOptions
from bigmac_lightning.datamodules import AudioProcessor, MultimodalDataModule
from bigmac_lightning.models import AudioEncoder, HFDecoder, VisionEncoder
from tests.datamodules.examples import data, model, said, write_mixed
from tests.datamodules.sounds import write_sound
from tests.datamodules.test_multimodal_training import Losses
from tests.models.parts import decoder_config
from tests.models.test_audio import WHISPER
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

TOWER = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, "num_channels": 3, "hidden_size": 24}
TOWER |= {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SECOND = {"feature_size": 8, "chunk_length": 1}
"""A window of one second: 100 columns of 160 samples, and so 50 frames of the tower."""


def module(**changes: Any) -> Any:
    audio = AudioEncoder({**WHISPER, "max_source_positions": 50}, 32, merge=5)
    encoders = {"image": VisionEncoder(TOWER, 32), "audio": audio}
    llm = HFDecoder(decoder_config(vocab_size=263, num_hidden_layers=3))
    return model(llm=llm, encoders=encoders, **changes)


def write(folder: Path) -> Path:
    """Records of all kinds, and in between sounds of 0.2 to 2.2 seconds, one of them beside an image."""
    path = write_mixed(folder, 15)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for k in range(8):
        name = write_sound(folder / f"{k}.{'wav' if k % 2 else 'mp3'}", 0.2 + 0.29 * k, low=100.0 * (k + 1)).name
        record: dict[str, Any] = {"messages": said("<audio>What is it?", f"tone {k}"), "audio": name}
        if k == 5:
            image = next(record["images"][0] for record in records if record.get("images"))
            record = {"messages": said("<image> and <audio>", "both"), "audios": [name], "images": [image]}
        records.insert(2 * k, record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def datamodule(path: Path) -> MultimodalDataModule:
    return data(path, media={"audio": AudioProcessor(SECOND, merge=5)}, token_budget=192)


def _trained(trainer: Any, path: Path, changes: dict[str, Any]) -> Any:
    losses, trained = Losses(), module(**changes)
    trainer.callbacks.append(losses)
    trainer.fit(trained, datamodule(path))
    if hasattr(trainer.strategy, "open_module"):
        trainer.strategy.open_module()
    return losses.losses, weights(trained)


def _fit(rank: int, world: int, path: Path, strategy: dict[str, Any], changes: dict[str, Any]) -> Any:
    return _trained(pipeline_trainer(world, strategy, max_epochs=1), path, changes)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sounds"))


def test_microbatches_have_all_modalities(records: Path) -> None:
    made = datamodule(records)
    made.prepare_data()
    made.setup("fit")
    batches = list(made.train_dataloader())
    kinds = [{item.encoder for item in m.media} for batch in batches for m in batch.microbatches]
    assert {"audio", "image"} in kinds
    sounds = [item for batch in batches for m in batch.microbatches for item in m.media if item.encoder == "audio"]
    assert sum(item.rows for item in sounds) > 40
    assert {len(item.data["windows"]) for item in sounds} == {1, 2, 3}
    assert all(len(item.data["frames"]) == 5 * item.rows for item in sounds)


@pytest.mark.parametrize(
    ("world", "strategy", "changes"),
    [
        (1, {}, {}),
        (2, {"policy": "filled"}, {}),
        (3, {}, {}),
        (2, {"backbone": "zb1p"}, {"freeze": ["encoders.audio.tower"]}),
        (2, {"sharding": ShardingOptions(encoders="fsdp")}, {}),
    ],
)
def test_training_equals_one_process(
    world: int, strategy: dict[str, Any], changes: dict[str, Any], records: Path
) -> None:

    expected, wanted = _trained(plain_trainer(max_epochs=1), records, changes)
    assert len(expected) > 2
    parts: dict[str, Any] = {}
    for losses, found in on_ranks(world, _fit, world, records, strategy, changes):
        assert losses == pytest.approx(expected, rel=1e-5)
        parts |= found
    assert parts.keys() >= {"encoders.audio.projector.weight", "encoders.audio.tower.encoder.conv1.weight"}
    # attention does not depend on the bias of keys, so its gradient is rounding, of which Adam makes steps
    compared = {name: found for name, found in parts.items() if not name.endswith("k_proj.bias")}
    assert_close(compared, wanted, 1e-4)
    assert torch.isfinite(torch.tensor(expected)).all()
