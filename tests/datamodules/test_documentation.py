"""The example of docs/data.md, as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest

from bigmac_lightning.datamodules import MultimodalDataModule
from tests.datamodules.examples import model, pictures
from tests.strategy.trainers import plain_trainer

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_a_source_for_a_folder_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, picture in enumerate(pictures(10)):
        file = tmp_path / "photos" / ("train" if i < 7 else "val") / ("odd" if i % 2 else "even") / picture.name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    exec(code.replace("patch_size=16", "patch_size=8"), names)
    datamodule = names["datamodule"]
    assert isinstance(datamodule, MultimodalDataModule)
    trainer = plain_trainer(max_epochs=1)
    trainer.fit(model(generators={}), datamodule)
    assert trainer.global_step == 1
    labels = [t for batch in datamodule.val_dataloader() for m in batch.microbatches for t in m.labels.tolist()]
    text = datamodule.encoder.tokenizer.decode(labels)
    assert sorted(text.replace("<|im_end|>", " ").split()) == ["even", "odd", "odd"]
