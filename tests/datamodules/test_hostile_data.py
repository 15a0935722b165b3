"""Files that strangers made to harm: each is refused by name, before it takes memory, disk or time."""

import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import save_file

from bigmac_lightning.datamodules import (
    CaptionFolder,
    ExampleError,
    File,
    HFDataset,
    Image,
    Limits,
    LlavaJSON,
    MessagesJSONL,
    Source,
    TextFiles,
    Video,
    WebDatasetTars,
)
from bigmac_lightning.datamodules.media.decoding import measure, read_image
from bigmac_lightning.datamodules.packing.measuring import Measurements
from tests.datamodules.clips import encoded
from tests.datamodules.examples import data, said, write_jsonl


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")


def saved(format: str, image: PIL.Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def many_scans() -> bytes:
    """Each scan of a few bytes is as much work as the whole image."""
    jpeg = saved("JPEG", PIL.Image.new("L", (64, 64)), progressive=True)
    return jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xda") : -2] * 200 + b"\xff\xd9"


def large_tile() -> bytes:
    """An image of 8 x 8 pixels in a tile of 900 million."""
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 277: 1, 322: 30_000, 323: 30_000, 324: 0, 325: 9}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(13)


BOMB = zlib.compress(bytes(20_000_000), 9)
IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "a text of zTXt": (lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + BOMB)), "Decompressed data too large"),
    "a profile": (lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + BOMB)), "Decompressed data too large"),
    "pixels": (lambda: png(10_000, 10_000), r"10000 x 10000 pixels; the most is 67,108,864.*raise limits\.pixels"),
    "more pixels": (lambda: png(60_000, 60_000), r"more than 178,956,970 pixels.*raise limits\.pixels"),
    "GIF": (lambda: b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(9), "limits.pixels|not an image"),
    "a tile": (large_tile, "tiles of 30000 x 30000 pixels, and only 8 x 8"),
    "scans": (many_scans, "more than 100 scans"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images(case: str, tmp_path: Path) -> None:
    content, reason = IMAGES[case]
    (tmp_path / "a.png").write_bytes(content())
    file = File.at(tmp_path / "a.png")
    with pytest.raises(ExampleError, match=rf"a\.png .*{reason}"):  # and no warning
        read_image(file, measure(Image(file)))


def test_bytes_of_an_image_and_its_limits(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(saved("PNG", PIL.Image.new("RGB", (8, 8))))
    with pytest.raises(ExampleError, match=r"it has \d+ bytes; the most is 20\. .* raise limits\.image_bytes"):
        measure(Image(File.at(tmp_path / "a.png")), Limits(image_bytes=20))
    with pytest.raises(ValueError, match=r"limits\.frames=0: give a number of at least 1"):
        Limits(frames=0)
    with pytest.raises(ValueError, match="Pillow opens no image of more"):
        Limits(pixels=1 << 30)


def listed(content: bytes, count: int) -> bytes:
    """A clip whose header says that it has so many frames of one byte."""
    made = bytearray(content)
    for box, value in ((b"stsz", (1, count)), (b"stts", (1, count)), (b"stsc", (1, 1, count, 1))):
        at = content.index(box) + 8
        made[at : at + 4 * len(value)] = struct.pack(f">{len(value)}I", *value)
    return bytes(made)


def test_a_video_of_billions_of_frames(tmp_path: Path) -> None:
    """FFmpeg would take 35 bytes of memory for each when it opens the file."""
    encoded()(tmp_path / "a.mp4")
    (tmp_path / "a.mp4").write_bytes(listed((tmp_path / "a.mp4").read_bytes(), 20_000_000))
    with pytest.raises(ExampleError, match="header lists 20,000,000 bytes of samples"):
        measure(Video(File.at(tmp_path / "a.mp4")))


def test_a_video_of_large_frames_is_not_decoded_when_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    original = av.open
    monkeypatch.setattr(av, "open", lambda *a, **k: given.append(k["options"]) or original(*a, **k))
    encoded()(tmp_path / "a.mkv")
    given.clear()
    measure(Video(File.at(tmp_path / "a.mkv")), Limits(pixels=5000))
    assert {options["max_pixels"] for options in given} == {"5000"}


# -- records


DEEP = '{"text": ' * 200_000


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def long_line(folder: Path) -> Source:
    path = write_jsonl(folder / "a.jsonl", [{"text": "x" * 5000}, {"text": "y"}])
    return MessagesJSONL(path, limits=Limits(record_bytes=1000))


def deep_line(folder: Path) -> Source:
    (folder / "a.jsonl").write_text(DEEP + "\n" + '{"text": "y"}\n')
    return MessagesJSONL(folder / "a.jsonl")


def digits(folder: Path) -> Source:
    (folder / "a.jsonl").write_text('{"text": ' + "9" * 10_000 + '}\n{"text": "y"}\n')
    return MessagesJSONL(folder / "a.jsonl")


def long_text(folder: Path) -> Source:
    (folder / "a.txt").write_text("x" * 5000 + "\n\ny")
    return TextFiles(str(folder / "a.txt"), "\n\n", limits=Limits(record_bytes=1000))


def long_member(folder: Path) -> Source:
    path = tar(folder / "a.tar", ("0.json", b'{"text": "' + b"x" * 5000 + b'"}'), ("1.json", b'{"text": "y"}'))
    return WebDatasetTars(str(path), limits=Limits(record_bytes=1000))


def deep_member(folder: Path) -> Source:
    path = tar(folder / "a.tar", ("0.json", DEEP.encode()), ("1.json", b'{"text": "y"}'))
    return WebDatasetTars(str(path))


def device(folder: Path) -> Source:
    with tarfile.open(folder / "a.tar", "w") as file:
        member = tarfile.TarInfo("0.json")
        member.type = tarfile.CHRTYPE
        file.addfile(member)
        content = b'{"text": "y"}'
        member = tarfile.TarInfo("1.json")
        member.size = len(content)
        file.addfile(member, io.BytesIO(content))
    return WebDatasetTars(str(folder / "a.tar"))


def long_caption(folder: Path) -> Source:
    for i in range(2):
        PIL.Image.new("RGB", (9, 9)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("x" * 5000 if i == 0 else "y")
    return CaptionFolder(folder, limits=Limits(record_bytes=1000))


RECORDS: dict[str, tuple[Callable[[Path], Source], str]] = {
    "a line": (long_line, r"\(line 1\) has 5,\d+ bytes; the most is 1,000.*raise limits\.record_bytes"),
    "a nested line": (deep_line, r"\(line 1\) has objects or lists that are nested too deep"),
    "a number": (digits, r"\(line 1\) is not JSON: Exceeds the limit"),
    "a text": (long_text, r"the text has 5,000 bytes; the most is 1,000"),
    "a member": (long_member, r"\.json has 5,\d+ bytes; the most is 1,000"),
    "a nested member": (deep_member, r"nested too deep"),
    "a device": (device, r"has \.json that is no file"),
    "a caption": (long_caption, r"\(0\.png\) its caption has 5,000 bytes; the most is 1,000"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_records(case: str, tmp_path: Path) -> None:
    """One example is refused, the other is read."""
    make, reason = RECORDS[case]
    source = make(tmp_path)
    with pytest.raises(ExampleError, match=reason):
        source[0]
    assert list(source[1].messages[-1].parts) == ["y"]


def test_limits_and_on_error(tmp_path: Path) -> None:
    """What exceeds a limit is a broken example like others: it ends the run, or is left out."""
    PIL.Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    records = [{"messages": said("<image>?", "y"), "images": [name]} for name in ("a.png", "b.png")]
    source = MessagesJSONL(write_jsonl(tmp_path / "a.jsonl", records), limits=Limits(pixels=100))
    with pytest.raises(ExampleError, match=r"1 of 2 train examples cannot be used.*\n.*a\.png has 30 x 30 pixels"):
        data(tmp_path / "a.jsonl", train=[source], val=[]).setup("fit")
    made = data(tmp_path / "a.jsonl", train=[source], val=[], on_error="skip")
    made.setup("fit")
    assert list(made._measured["train"][0].errors) == [0]
    source.limits = Limits()  # and is measured again when the limit is raised
    made = data(tmp_path / "a.jsonl", train=[source], val=[])
    made.setup("fit")
    assert not made._measured["train"][0].errors


def test_nested_lists_of_records(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(DEEP)
    with pytest.raises(ValueError, match=r"a\.json has objects or lists that are nested too deep"):
        LlavaJSON(tmp_path / "a.json")


@pytest.mark.parametrize("size", [-512, 1 << 40])
def test_sizes_of_members(size: int, tmp_path: Path) -> None:
    """With a negative size, Python's tarfile may read the same member for ever."""
    path = tar(tmp_path / "a.tar", ("0.txt", b"x"), ("1.txt", b"y"))
    content = bytearray(path.read_bytes())
    content[124:136] = (size & ((1 << 96) - 1)).to_bytes(12, "big")
    content[124] = 0xFF if size < 0 else 0x80
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar is not an uncompressed tar"):
        WebDatasetTars(str(path))


# -- links


def test_links_of_patterns(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").symlink_to("../secret")
    tar(tmp_path / "shard", ("0.json", b'{"text": "y"}'))
    (tmp_path / "books" / "a.tar").symlink_to("../shard")
    for kind, ending in ((TextFiles, "txt"), (WebDatasetTars, "tar")):
        with pytest.raises(ValueError, match=rf"a\.{ending} is a link to .*If it is meant, set link_roots="):
            kind(str(tmp_path / "books" / f"*.{ending}"))
        assert len(kind(str(tmp_path / "books" / f"*.{ending}"), link_roots=[str(tmp_path)])) == 1
        assert len(kind([str(tmp_path / "books" / f"a.{ending}")])) == 1


def test_folders_of_captions_that_lead_to_the_whole_disk(tmp_path: Path) -> None:
    folders = [tmp_path / "photos", *(tmp_path / "photos" / str(i) for i in range(12))]
    for folder in folders:
        folder.mkdir()
        for i in range(12):  # there are 12! ways through them
            (folder / f"to {i}").symlink_to(tmp_path / "photos" / str(i))
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "1.png")
    (tmp_path / "photos" / "1.txt").write_text("a caption")
    (tmp_path / "photos" / "disk").symlink_to("/")
    source = CaptionFolder(tmp_path / "photos")
    assert source.files == ["1.png", "disk"]
    with pytest.raises(ExampleError, match="'disk' leads out of the media root: it is /"):
        source[1]


# -- columns and caches


def test_parquet_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte that is stored once, and stands in each of many rows."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100_000, pyarrow.int32()), ["x" * 1_000_000])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"have grown to [\d,]+ bytes by decompression; the most is 10,000,000"):
        HFDataset("parquet", str(tmp_path / "a.parquet"), limits=Limits(always_allowed=10_000_000))


def test_a_folder_that_names_data_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files: {json.dumps(str(tmp_path / 'secret.txt'))}\n---\n"
    )
    with pytest.raises(ValueError, match=r"rows names the data file .*secret\.txt, which is not in it"):
        HFDataset(str(tmp_path / "rows"))


def _other(file: Path, **others: Any) -> None:
    """Write measurements of which some arrays are others; ``None``: it is not there."""
    arrays = {**Measurements.of([]).arrays, **others}
    save_file({name: array for name, array in arrays.items() if array is not None}, file)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(pickle.dumps({"tokens": np.zeros(3)})),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"PK"),
        lambda file: file.write_bytes(b"\xff" * 64),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes().replace(b"[0,4]", b"[9,4]")),
        lambda file: file.unlink(),
        lambda file: _other(file, tokens=None),
        lambda file: _other(file, more=np.zeros(3)),
        lambda file: _other(file, tokens=np.zeros(3, np.int64)),
        lambda file: _other(file, tokens=np.zeros((0, 2), np.int64)),
        lambda file: _other(file, tokens=np.zeros(0)),
        lambda file: _other(file, bad=np.zeros(1, np.int64)),
    ],
)
def test_measurements(spoil: Callable[[Path], Any], tmp_path: Path) -> None:
    """Stored ones that are hostile or damaged are not read; the examples are measured again."""
    file = tmp_path / "a.safetensors"
    Measurements.of([]).save(file)
    assert len(Measurements.load(file)) == 0
    spoil(file)
    with pytest.raises(ValueError, match=r"SafetensorError|No such file|has the arrays|type|lengths"):
        Measurements.load(file)
