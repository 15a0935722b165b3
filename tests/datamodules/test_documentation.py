"""The examples in docs/data.md run as they are printed there."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from bigmac_lightning.datamodules import MultimodalDataModule
from tests.blocks import block_with
from tests.datamodules import chat_table, media_table
from tests.datamodules.examples import model, pictures
from tests.training.trainers import plain_trainer

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def run(words: str) -> MultimodalDataModule:
    """The DataModule of the example that has these words."""
    code = block_with("docs/data.md", words)
    names: dict[str, Any] = {"__name__": "page"}
    exec(code.replace("patch_size=16", "patch_size=8"), names)
    datamodule = names["datamodule"]
    assert isinstance(datamodule, MultimodalDataModule)
    return datamodule


def test_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "photos.jsonl", "w") as file:
        for picture in pictures(12):
            image = base64.b64encode(picture.read_bytes()).decode()
            file.write(json.dumps({"name": picture.name, "label": picture.stem, "image": image}) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    datamodule = run("class Records")
    trainer = plain_trainer(max_epochs=2)
    trainer.fit(model(generators={}), datamodule)
    assert trainer.global_step == 8
    assert len(datamodule.train_dataloader()) == 4
    labels = [t for batch in datamodule.val_dataloader() for m in batch.microbatches for t in m.labels.tolist()]
    assert datamodule.encoder.tokenizer.decode(labels).replace("<|im_end|>", " ").split() == ["0", "1", "2"]


def test_a_source_for_a_folder_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, picture in enumerate(pictures(10)):
        file = tmp_path / "photos" / ("train" if i < 7 else "val") / ("odd" if i % 2 else "even") / picture.name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    datamodule = run("class LabelledFolder")
    trainer = plain_trainer(max_epochs=1)
    trainer.fit(model(generators={}), datamodule)
    assert trainer.global_step == 1
    labels = [t for batch in datamodule.val_dataloader() for m in batch.microbatches for t in m.labels.tolist()]
    text = datamodule.encoder.tokenizer.decode(labels)
    assert sorted(text.replace("<|im_end|>", " ").split()) == ["even", "odd", "odd"]


def test_the_documented_chat_templates_do_as_documented() -> None:
    """Labels of every template and conversation."""
    assert PAGE.read_text() == chat_table.page(), "run: python -m tests.datamodules.chat_table"


def test_the_documented_media_are_those_that_are_tested() -> None:
    assert PAGE.read_text() == media_table.page(), "run: python -m tests.datamodules.media_table"
