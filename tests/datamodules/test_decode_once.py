"""Over all ranks of a pipeline, a media file is opened and decoded once per epoch."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bigmac_lightning.datamodules.media import decoding
from tests.datamodules.examples import data, model, write_mixed
from tests.training.trainers import on_ranks, pipeline_trainer

ENDINGS = (".png", ".mp4")


def _watch(folder: Path) -> tuple[Counter[str], Counter[str]]:
    """Media files opened below a folder, by Python's own audit of every `open`; and those decoded."""
    opened: Counter[str] = Counter()
    decoded: Counter[str] = Counter()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(str(folder)) and str(arguments[0]).endswith(ENDINGS):
            opened[Path(arguments[0]).name] += 1

    def counting(function: Any) -> Any:
        def decode(file: Any, *rest: Any) -> Any:
            decoded[Path(file.name).name] += 1
            return function(file, *rest)

        return decode

    sys.addaudithook(audit)
    from bigmac_lightning.datamodules.encoding import visual

    visual.read_image, visual.read_frames = counting(decoding.read_image), counting(decoding.read_frames)
    return opened, decoded


def _epoch(rank: int, world: int, path: Path) -> tuple[Counter[str], Counter[str], int]:
    opened, decoded = _watch(path.parent)
    made = data(path)
    trainer = pipeline_trainer(world, max_epochs=1, limit_val_batches=0)
    trainer.fit(model(llm=_deeper()), made)
    return opened, decoded, trainer.global_step


def _deeper() -> Any:
    from bigmac_lightning.models import HFDecoder
    from tests.datamodules.examples import VOCABULARY
    from tests.models.parts import decoder_config

    return HFDecoder(decoder_config(vocab_size=VOCABULARY, num_hidden_layers=4))


@pytest.mark.parametrize("world", [4])
def test_every_file_is_opened_and_decoded_once(world: int, tmp_path: Path) -> None:
    path = write_mixed(tmp_path)
    expected = {file.name for file in tmp_path.iterdir() if file.suffix in ENDINGS}
    data(path).prepare_data()  # reads headers, once and for all runs
    results = on_ranks(world, _epoch, world, path)
    opened, decoded = (sum((result[k] for result in results), Counter[str]()) for k in (0, 1))
    assert opened == decoded == dict.fromkeys(expected, 1)
    assert all(result[0] for result in results), "no rank goes without work"
    assert results[0][2] > 1
