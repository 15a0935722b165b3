"""The real conversation: its pieces, and that a model learns from them who speaks."""

import re
from pathlib import Path

import pytest

from bigmac_lightning.datamodules import TwoSpeakers
from bigmac_lightning.datamodules.examples.two_speakers import HELD_OUT
from bigmac_lightning.datamodules.media.decoding import measure
from bigmac_lightning.datamodules.media.sounds import read_sound
from tests.cli.commands import bigmac

CONFIG = Path(__file__).parents[2] / "configs" / "two_speakers.yaml"


def test_pieces() -> None:
    train, val = TwoSpeakers(), TwoSpeakers("val")
    for source in (train, val):
        answers = [example.messages[-1].parts[0] for example in source]
        assert set(answers) == {"nobody", "the first", "the second"}
        assert min(answers.count(answer) for answer in set(answers)) > len(answers) / 5
    assert len(train) > 2 * len(val) > 200
    for start, _ in val.pieces:
        assert any(a <= start and start + 0.5 <= b for a, b in HELD_OUT)
        assert all(abs(start - other) >= 0.5 - 1e-6 for other, _ in train.pieces), "pieces of both do not overlap"
    loud = {}
    for example in val:
        [sound] = example.media
        size = measure(sound)
        assert (size.frames, size.seconds) == (8000, 0.5)
        loud.setdefault(example.messages[-1].parts[0], []).append(float(read_sound(sound.file, size, 16_000).std()))
    assert max(loud["nobody"]) < min(sum(of) / len(of) for name, of in loud.items() if name != "nobody")


@pytest.mark.wide
def test_a_model_learns_who_speaks(tmp_path: Path) -> None:
    said = bigmac(2, tmp_path, "fit", "--config", str(CONFIG), "--trainer.default_root_dir=out")
    [accuracy] = re.findall(r"val/accuracy\s*│\s*([\d.]+)", said)
    assert float(accuracy) > 0.97
