"""Pictures of every kind in the table: their measured sizes are those of decoding, and their pixels those expected."""

import sys
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pillow_heif
import pytest
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from bigmac_lightning.datamodules import ExampleError, File, Image, Size
from bigmac_lightning.datamodules.media.decoding import measure, read_image
from tests.datamodules.examples import package_folder
from tests.datamodules.pictures import AS_LIBRARY, ON_WHITE, PICTURES, Picture

READ = [picture for picture in PICTURES if not picture.refused]
REFUSED = [picture for picture in PICTURES if picture.refused]


def expected(picture: Picture, path: Path) -> np.ndarray:
    """(H, W, 3)"""
    if picture.expected is not None:
        pixels = picture.expected.astype(np.uint8)
        return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, -1)
    with PIL.Image.open(path) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, that transparency is lost
        opaque = np.array(load_image(image))
        if picture.reading == AS_LIBRARY:
            return opaque
        assert picture.reading == ON_WHITE
        pixels = convert_to_rgb(PIL.ImageOps.exif_transpose(image), return_numpy=True)
    assert isinstance(pixels, np.ndarray)
    assert not np.array_equal(pixels, opaque), "what is transparent has another colour"
    return pixels


@pytest.mark.parametrize("picture", READ, ids=lambda picture: picture.id)
def test_measured_and_decoded(picture: Picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = picture.write(tmp_path)
    pixels = expected(picture, path)
    file = File.at(path)
    with monkeypatch.context() as undecoded:
        undecoded.setattr(PIL.Image.core, "new", None)  # without which no pixels come into being
        size = measure(Image(file))
    assert size == Size(*pixels.shape[:2])
    assert np.array_equal(read_image(file, size).permute(1, 2, 0).numpy(), pixels)
    gray = np.array(PIL.Image.fromarray(pixels).convert("L"))
    assert np.array_equal(read_image(file, size, "L")[0].numpy(), gray)


@pytest.mark.parametrize("picture", REFUSED, ids=lambda picture: picture.id)
def test_refused(picture: Picture, tmp_path: Path) -> None:
    file = File.at(picture.write(tmp_path))
    if picture.when == "measured":
        with pytest.raises(ExampleError, match=rf"picture\.\w+ cannot be read: .*{picture.refused}"):
            measure(Image(file))
    else:
        size = measure(Image(file))
        with pytest.raises(ExampleError, match=rf"picture\.\w+ cannot be decoded: .*{picture.refused}"):
            read_image(file, size)


def test_heic_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(ExampleError, match=r"a\.heic cannot be read: it is a HEIC image: `pip install pillow-heif`"):
        measure(Image(File.at(tmp_path / "a.heic")))


@pytest.mark.parametrize("orientation", [1, 6])
def test_heic_with_the_package(orientation: int, tmp_path: Path) -> None:
    pillow_heif.register_heif_opener()
    path = tmp_path / "a.heic"
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path, exif=exif)
    size = measure(Image(File.at(path)))
    assert np.array_equal(read_image(File.at(path), size).permute(1, 2, 0).numpy(), np.array(load_image(str(path))))


def test_a_photograph() -> None:
    """With what a camera and an editor leave in a file."""
    path = package_folder("sklearn") / "datasets" / "images" / "china.jpg"
    size = measure(Image(File.at(path)))
    assert size == Size(427, 640)
    assert np.array_equal(read_image(File.at(path), size).permute(1, 2, 0).numpy(), np.array(load_image(str(path))))
