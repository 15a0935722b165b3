"""Stored measurements: what is measured again, and names of data files."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from bigmac_lightning.datamodules import MessagesJSONL, TextFiles, WebDatasetTars
from bigmac_lightning.datamodules.packing.measuring import Measured, Measurements, Size
from bigmac_lightning.datamodules.sources.data_files import expanded
from tests.datamodules.examples import data, said, write_jsonl
from tests.datamodules.test_hostile_data import tar


class Counting(MessagesJSONL):
    """Notes which examples are read."""

    read: list[int]

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return super().__getitem__(index)


def _measured(path: Path) -> tuple[Measurements, list[int]]:
    source = Counting(path)
    source.read = []
    made = data(path, train=[source], val=[], on_error="skip")
    made.prepare_data()
    made.setup("fit")
    return made._measured["train"][0], source.read


def test_only_broken_examples_are_measured_again(tmp_path: Path) -> None:
    number, broken = 12, (3, 4, 11)
    records = [
        {"messages": said("<image>?" * (1 + i % 2), f"{i}"), "images": [f"{i}.png"] * (1 + i % 2)}
        for i in range(number)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    for i in range(number):
        if i not in broken:
            PIL.Image.new("RGB", (8 + i, 9)).save(tmp_path / f"{i}.png")
    first, read = _measured(path)
    assert (sorted(first.errors), read) == ([3, 4, 11], list(range(number)))
    again, read = _measured(path)
    assert (again.errors, read) == (first.errors, [3, 4, 11])
    for i in (4, 11):
        PIL.Image.new("RGB", (8 + i, 9)).save(tmp_path / f"{i}.png")
    mended, read = _measured(path)
    assert (sorted(mended.errors), read) == ([3], [3, 4, 11])
    _, read = _measured(path)
    assert read == [3], "the mended ones are stored"
    PIL.Image.new("RGB", (11, 9)).save(tmp_path / "3.png")
    assert _measured(path)[1] == [3]
    assert _measured(path)[1] == []
    for cached in (tmp_path / "measured").iterdir():
        cached.unlink()
    whole, read = _measured(path)
    assert len(read) == number
    for name, array in whole.arrays.items():
        assert np.array_equal(array, _measured(path)[0].arrays[name]), name
    for i in range(number):
        assert whole.sizes(i) == [Size(9, 8 + i)] * (1 + i % 2)


def test_examples_take_the_places_of_others() -> None:
    """Any of them, with any number of items."""
    generator = np.random.default_rng(0)

    def drawn() -> Measured:
        sizes = tuple(Size(int(h), 1) for h in generator.integers(1, 9, generator.integers(0, 4)))
        return Measured(int(generator.integers(1, 50)), 1, len(sizes), float(len(sizes)), 2.0, sizes)

    for _ in range(30):
        whole = [drawn() for _ in range(8)]
        bad = [i for i in range(8) if generator.random() < 0.5]
        stored = Measurements.of([Measured(error="x") if i in bad else one for i, one in enumerate(whole)])
        still = [i for i in bad if generator.random() < 0.3]
        found = stored.replaced({i: Measured(error="y") if i in still else whole[i] for i in bad})
        expected = Measurements.of([Measured(error="y") if i in still else one for i, one in enumerate(whole)])
        assert found.errors == expected.errors
        for name, array in expected.arrays.items():
            assert np.array_equal(found.arrays[name], array), name
            assert found.arrays[name].dtype.kind == array.dtype.kind, name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ["a"]),
        ("a{0..2}", ["a0", "a1", "a2"]),
        ("a{08..11}b", ["a08b", "a09b", "a10b", "a11b"]),
        ("{000..002}", ["000", "001", "002"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{x,y}{1..2}", ["x1", "x2", "y1", "y2"]),
        ("{x,}z", ["xz", "z"]),
    ],
)
def test_braces(text: str, expected: list[str]) -> None:
    assert expanded(text) == expected


def test_files_of_braces_and_folders(tmp_path: Path) -> None:
    for k in range(3):
        tar(tmp_path / f"s{k}.tar", (f"{k}.txt", b"x"), (f"{k}.jpg", b"y"))
        (tmp_path / f"t{k}.txt").write_text("text")
    assert [len(WebDatasetTars(f"{tmp_path}/{name}")) for name in ("s{0..2}.tar", "s{1,2}.tar", "", "s*.tar")] == [
        3,
        2,
        3,
        3,
    ]
    assert len(TextFiles(str(tmp_path))) == 3
    with pytest.raises(ValueError, match=r"WebDatasetTars: there is no file .*s3\.tar: correct the path"):
        WebDatasetTars(f"{tmp_path}/s{{0..3}}.tar")
