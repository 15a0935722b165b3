"""Images, read by Pillow: sizes from headers, and pixels as the processors of the `transformers` library see them.

Pillow turns values of more than 8 bits into white, and loses transparency in some formats. Such images are converted
here, or refused.

Shape suffixes: C channels, H and W pixels.
"""

import importlib
import os
import struct
import warnings
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO, Literal

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import PIL.TiffImagePlugin
import torch
from torch import Tensor

from ..example import Size
from ..files import File
from ..limits import LARGEST_PILLOW, Limits
from .jpeg_scans import check_scans
from .opening import check_same, opened

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are read; "JPEG" includes MPO. Of the others, some run programs (EPS), and some
decode to another size than their header has (ICO)."""

HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""Brands of HEIC files: bytes 8 to 12 of the file, from ISO/IEC 23008-12."""

SMALL_TILE = 1024 * 1024
"""Pixels of a tile of TIFF that any image may have."""

Mode = Literal["L", "RGB"]


@dataclass(frozen=True)
class _Header:
    """The header of an image.

    Attributes:
        size: as displayed.
        bits: number of bits of a value in the file, which Pillow's mode may not tell.
        white_is_zero: whether values must be inverted, since Pillow does not do it.
    """

    size: Size
    bits: int = 8
    white_is_zero: bool = False


def image_size(stream: BinaryIO, limits: Limits) -> Size:
    """The size of an image as displayed, without decoding it.

    Raises:
        ValueError: the image could not be decoded correctly, or its file is too large. Pillow may raise other
            exceptions.
    """
    if (found := stream.seek(0, os.SEEK_END)) > limits.image_bytes:
        raise ValueError(limits.exceeded("image_bytes", f"it has {found:,} bytes"))
    stream.seek(0)
    try:
        with _open(stream) as image:
            return _header(image, stream).size
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(limits.exceeded("pixels", f"it has more than {LARGEST_PILLOW:,} pixels")) from error


def read_image(file: File, size: Size, mode: Mode = "RGB") -> Tensor:
    """image_CHW, uint8, as displayed on white; of several frames or pages, the first.

    Args:
        size: the size that was measured.

    Raises:
        ExampleError: the file is missing or broken, or is not the one that was measured.
    """
    with opened(file, "decoded") as stream, _open(stream) as image:
        header = _header(image, stream)
        check_same(file, header.size, size)
        if image.format in ("JPEG", "MPO"):
            check_scans(file)
        PIL.ImageOps.exif_transpose(image, in_place=True)
        pixels_HWC = np.array(on_white(_of_eight_bits(image, header)).convert(mode))
    return torch.from_numpy(pixels_HWC.reshape(*pixels_HWC.shape[:2], -1)).permute(2, 0, 1).contiguous()


def on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image in RGB. Transparent pixels are blended with white, as `convert_to_rgb` of the library does."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    whole = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", whole.size, "white"), whole).convert("RGB")


def _open(stream: BinaryIO) -> PIL.Image.Image:
    head = stream.read(12)
    stream.seek(0)
    if head[4:8] != b"ftyp" or head[8:] not in HEIC:
        try:
            return _by_pillow(stream, FORMATS)
        except PIL.UnidentifiedImageError as error:
            raise ValueError("not an image, or broken from its first bytes on") from error
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError as error:
        raise ValueError("it is a HEIC image: `pip install pillow-heif` to read it, or convert it to JPEG") from error
    return _by_pillow(stream, ("HEIF",))


def _by_pillow(stream: BinaryIO, formats: tuple[str, ...]) -> PIL.Image.Image:
    with warnings.catch_warnings():  # of images with many pixels, which are refused later if they are too many
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        return PIL.Image.open(stream, formats=formats)


def _header(image: PIL.Image.Image, stream: BinaryIO) -> _Header:
    """The header of an image whose values have a known meaning.

    Raises:
        ValueError: it is not known which of its values are black, white or transparent.
    """
    bits, white_is_zero, oriented, tags = 16 if image.mode.startswith("I") else 8, False, False, image
    if isinstance(image, PIL.TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(PIL.TiffImagePlugin.BITSPERSAMPLE, (bits,))[0]
        white_is_zero = image.tag_v2.get(PIL.TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        oriented = True  # Pillow has applied the orientation to size and pixels
        _check_tiles(image)
    elif image.format == "PNG":
        bits, tags = _png_header(stream)
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit or signed integers"
        raise ValueError(f"its pixels are {kind}, and no file says which of them is white: save it with 8 or 16 bits")
    if image.mode == "RGB" and bits == 16 and "transparency" in image.info:
        raise ValueError("one of its 16-bit colours is transparent, which Pillow forgets: save it with 8 bits")
    # PngImageFile.getexif would decode the image
    orientation = 1 if oriented else PIL.Image.Image.getexif(tags).get(PIL.ExifTags.Base.Orientation, 1)
    width, height = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
    return _Header(Size(height, width), bits, white_is_zero)


def _check_tiles(image: PIL.TiffImagePlugin.TiffImageFile) -> None:
    """
    Raises:
        ValueError: one of its tiles, which are decoded whole, is much larger than the image.
    """
    height, width = (
        image.tag_v2.get(tag, 1) for tag in (PIL.TiffImagePlugin.TILELENGTH, PIL.TiffImagePlugin.TILEWIDTH)
    )
    if height * width > 4 * image.size[0] * image.size[1] + SMALL_TILE:
        raise ValueError(
            f"it has tiles of {height} x {width} pixels, and only {image.size[1]} x {image.size[0]} pixels itself"
        )


def _png_header(stream: BinaryIO) -> tuple[int, PIL.Image.Image]:
    """The bits per value, and the image without its pixels, since its orientation may be stored after them.

    Raises:
        ValueError: the file breaks off among its pixels.
    """
    stream.seek(0)
    chunks = [stream.read(8)]
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"IHDR", b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            body = stream.read(length)
            chunks += [struct.pack(">I4s", len(body), kind), body, struct.pack(">I", zlib.crc32(kind + body))]
            stream.seek(4, os.SEEK_CUR)
        elif kind == b"IEND":
            break
        elif length:
            stream.seek(length - 1, os.SEEK_CUR)
            if not stream.read(1) and kind == b"IDAT":
                raise ValueError("it breaks off among its pixels")
            stream.seek(4, os.SEEK_CUR)
        else:
            stream.seek(4, os.SEEK_CUR)
    chunks.append(struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND")))
    return chunks[2][8], _by_pillow(BytesIO(b"".join(chunks)), ("PNG",))


def _of_eight_bits(image: PIL.Image.Image, header: _Header) -> PIL.Image.Image:
    """The upper 8 of 12 or 16 bits of gray values, as Pillow reads those of colours, with their transparency."""
    transparent = image.info.get("transparency")
    if image.mode == "L" and image.format == "PNG" and header.bits < 8 and transparent is not None:
        image.info["transparency"] = transparent * 255 // (2**header.bits - 1)  # as Pillow scales it for other depths
    if not image.mode.startswith("I"):
        return image
    values_HW = np.asarray(image)
    if header.white_is_zero:
        values_HW = 2**header.bits - 1 - values_HW
    gray = PIL.Image.fromarray((values_HW >> (header.bits - 8)).astype(np.uint8))
    if transparent is not None:
        gray.putalpha(PIL.Image.fromarray(np.where(values_HW == transparent, 0, 255).astype(np.uint8)))
    return gray
