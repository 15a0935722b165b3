"""Picture files of all kinds that people bring, made here, and what is to be read of each."""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin

H, W = 5, 7
COLOURS = np.random.default_rng(0).integers(0, 256, (H, W, 4), dtype=np.uint8)
DEEP = np.linspace(0, 65535, H * W).astype(np.uint16).reshape(H, W)

AS_LIBRARY = "as the library's `load_image`"
ON_WHITE = "on white, as the library's `convert_to_rgb`"
UPPER = "the upper 8 bits (the library: white)"


@dataclass(frozen=True)
class Picture:
    """A file.

    Attributes:
        format, kind: what documentation calls it.
        content: of the file.
        reading: what documentation says is read of it.
        expected: (H, W, 3) or (H, W) pixels worked out by hand; ``None``: those of the library.
        refused: what is said of it, if it cannot be read.
        when: it is found to be broken.
    """

    format: str
    kind: str
    content: Callable[[], bytes]
    reading: str = AS_LIBRARY
    expected: Any = None
    refused: str = ""
    when: Literal["measured", "decoded"] = "measured"

    @property
    def id(self) -> str:
        return f"{self.format}: {self.kind}"

    def write(self, folder: Path) -> Path:
        path = folder / f"picture.{self.format.lower()}"
        path.write_bytes(self.content())
        return path


def image(mode: str) -> PIL.Image.Image:
    """In a mode of Pillow."""
    if mode == "I;16":
        return PIL.Image.fromarray(DEEP)
    if mode == "F":
        return PIL.Image.fromarray((DEEP / 65535).astype(np.float32))
    if mode == "I":
        return PIL.Image.fromarray(DEEP.astype(np.int32))
    whole = PIL.Image.fromarray(COLOURS)
    return whole.convert(mode) if mode in ("LA", "PA", "RGBA") else whole.convert("RGB").convert(mode)


def one(mode: str) -> Any:
    """A value that its pixels have."""
    return image(mode).getpixel((1, 1))


def saved(mode: str, format: str, **arguments: Any) -> Callable[[], bytes]:
    def content() -> bytes:
        made = io.BytesIO()
        image(mode).save(made, format, **arguments)
        return made.getvalue()

    return content


def several(mode: str, format: str, **arguments: Any) -> Callable[[], bytes]:
    """An animation or pages: what is to be read, then other things."""
    others = [PIL.Image.new("RGB", (W, H), colour).convert(mode) for colour in ("red", "blue")]
    return saved(mode, format, save_all=True, append_images=others, **arguments)


def turned(mode: str, format: str, orientation: int, **arguments: Any) -> Callable[[], bytes]:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return saved(mode, format, exif=exif, **arguments)


# -- PNGs that Pillow does not write


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(bits: int, colour: int, rows: np.ndarray, before: bytes = b"", behind: bytes = b"") -> Callable[[], bytes]:
    """
    Args:
        colour: 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGBA.
        rows: (H, values).
    """

    def content() -> bytes:
        values = rows.shape[1] // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
        header = struct.pack(">IIBBBBB", values, len(rows), bits, colour, 0, 0, 0)
        if bits < 8:
            digits = (rows[..., None] >> np.arange(bits)[::-1] & 1).astype(np.uint8)
            packed = np.packbits(digits.reshape(len(rows), -1), axis=1)
        else:
            packed = rows.astype(">u2" if bits == 16 else np.uint8)
        pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
        parts = [
            chunk(b"IHDR", header),
            before,
            *(chunk(b"IDAT", pixels[i : i + 20]) for i in range(0, len(pixels), 20)),
        ]
        return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + behind + chunk(b"IEND", b"")

    return content


def exif_chunk(orientation: int) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return chunk(b"eXIf", exif.tobytes()[6:])


def raw_profile(orientation: int) -> bytes:
    """As ImageMagick used to write it."""
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    text = f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n"
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text.encode()))


GRAY2 = np.arange(H * W).reshape(H, W) % 4
RGB_ROWS = COLOURS[..., :3].reshape(H, -1)
DEEP_RGB = (COLOURS[..., :3].astype(np.uint16) * 256 + 77).reshape(H, -1)
DEEP_LA = np.stack([DEEP, DEEP[::-1]], -1).reshape(H, -1)


# -- TIFFs that Pillow does not write


def tiff(bits: int, white_is_zero: bool = False) -> Callable[[], bytes]:
    """Gray, of 12 or 16 bits."""

    def content() -> bytes:
        if bits == 12:
            digits = (DEEP[..., None] >> np.arange(4, 16)[::-1] & 1).astype(np.uint8)
            pixels = np.packbits(digits.reshape(H, -1), axis=1).tobytes()
        else:
            pixels = (65535 - DEEP if white_is_zero else DEEP).astype("<u2").tobytes()
        tags = {
            256: W,
            257: H,
            258: bits,
            259: 1,
            262: 0 if white_is_zero else 1,
            273: 8,
            277: 1,
            278: H,
            279: len(pixels),
        }
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        return (
            struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
            + pixels
            + struct.pack("<H", len(tags))
            + entries
            + bytes(4)
        )

    return content


# -- others


def cut(content: Callable[[], bytes], share: float) -> Callable[[], bytes]:
    return lambda: content()[: int(len(content()) * share)]


def pgm16() -> bytes:
    return f"P5 {W} {H} 65535\n".encode() + DEEP.astype(">u2").tobytes()


def mpo() -> bytes:
    made = io.BytesIO()
    image("RGB").save(made, "MPO", save_all=True, append_images=[PIL.Image.new("RGB", (W, H), "red")])
    return made.getvalue()


def icc() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def transparent_gray2() -> np.ndarray:
    """What 2 bits of gray with a transparent 1 are."""
    return np.where(GRAY2 == 1, 255, GRAY2 * 85).astype(np.uint8)


def transparent_deep() -> np.ndarray:
    return np.where(DEEP[0, 3] == DEEP, 255, DEEP >> 8).astype(np.uint8)


BAD_RANGE = "no file says which of them is white"
ALL = range(1, 9)

PICTURES = [
    Picture("PNG", "black and white", saved("1", "PNG")),
    Picture("PNG", "gray", saved("L", "PNG")),
    Picture("PNG", "gray of 2 bits", png(2, 0, GRAY2)),
    Picture("PNG", "palette", saved("P", "PNG")),
    Picture("PNG", "RGB", saved("RGB", "PNG")),
    Picture("PNG", "RGB of 16 bits", png(16, 2, DEEP_RGB)),
    Picture("PNG", "colour profile (ignored)", lambda: saved("RGB", "PNG", icc_profile=icc())()),
    *(Picture("PNG", f"eXIf orientation {o}", turned("RGB", "PNG", o)) for o in ALL),
    Picture("PNG", "eXIf behind the pixels", png(8, 2, RGB_ROWS, behind=exif_chunk(6))),
    Picture("PNG", "orientation as of ImageMagick", png(8, 2, RGB_ROWS, behind=raw_profile(8))),
    Picture("PNG", "animated: the first frame", several("RGB", "PNG")),
    Picture("PNG", "gray and alpha", saved("LA", "PNG"), ON_WHITE),
    Picture("PNG", "gray and alpha of 16 bits", png(16, 4, DEEP_LA), ON_WHITE),
    Picture("PNG", "RGBA", saved("RGBA", "PNG"), ON_WHITE),
    Picture("PNG", "palette with a transparent entry", saved("P", "PNG", transparency=one("P")), ON_WHITE),
    Picture("PNG", "palette with alpha", saved("P", "PNG", transparency=bytes(range(0, 256, 2))), ON_WHITE),
    Picture("PNG", "RGB with a transparent colour", saved("RGB", "PNG", transparency=one("RGB")), ON_WHITE),
    Picture("PNG", "gray with a transparent value", saved("L", "PNG", transparency=one("L")), ON_WHITE),
    Picture("PNG", "black and white with a transparent value", png(1, 0, GRAY2 % 2, chunk(b"tRNS", bytes(2))),
            ON_WHITE),
    Picture("PNG", "gray of 2 bits with a transparent value", png(2, 0, GRAY2, chunk(b"tRNS", b"\0\1")),
            "on white (the library: transparency is lost)", transparent_gray2()),
    Picture("PNG", "gray of 16 bits", saved("I;16", "PNG"), UPPER, DEEP >> 8),
    Picture("PNG", "gray of 16 bits, turned", turned("I;16", "PNG", 8), UPPER, np.rot90(DEEP >> 8)),
    Picture("PNG", "gray of 16 bits with a transparent value",
            png(16, 0, DEEP, chunk(b"tRNS", struct.pack(">H", DEEP[0, 3]))), UPPER, transparent_deep()),
    Picture("PNG", "RGB of 16 bits with a transparent colour", png(16, 2, DEEP_RGB, chunk(b"tRNS", bytes(6))),
            refused="one of its 16-bit colours is transparent"),
    Picture("PNG", "broken off", cut(saved("RGB", "PNG"), 0.7), refused="breaks off among its pixels"),
    Picture("JPEG", "gray", saved("L", "JPEG")),
    Picture("JPEG", "RGB", saved("RGB", "JPEG")),
    Picture("JPEG", "progressive", saved("RGB", "JPEG", progressive=True)),
    Picture("JPEG", "CMYK", saved("CMYK", "JPEG")),
    *(Picture("JPEG", f"EXIF orientation {o}", turned("RGB", "JPEG", o)) for o in (*ALL, 9)),
    Picture("JPEG", "EXIF that is no EXIF", saved("RGB", "JPEG", exif=b"Exif\0\0nonsense")),
    Picture("JPEG", "several pictures (MPO): the first", mpo),
    Picture("JPEG", "broken off", cut(saved("RGB", "JPEG", quality=100), 0.9), refused="truncated", when="decoded"),
    Picture("WEBP", "lossy", saved("RGB", "WEBP")),
    Picture("WEBP", "lossless", saved("RGB", "WEBP", lossless=True)),
    Picture("WEBP", "alpha", saved("RGBA", "WEBP", lossless=True), ON_WHITE),
    Picture("WEBP", "animated: the first frame", several("RGB", "WEBP", lossless=True)),
    *(Picture("WEBP", f"EXIF orientation {o}", turned("RGB", "WEBP", o)) for o in (1, 3, 6)),
    Picture("WEBP", "broken off", cut(saved("RGB", "WEBP"), 0.7), refused="could not create decoder"),
    Picture("AVIF", "RGB", saved("RGB", "AVIF")),
    Picture("AVIF", "alpha", saved("RGBA", "AVIF"), ON_WHITE),
    *(Picture("AVIF", f"orientation {o}", turned("RGB", "AVIF", o)) for o in (1, 4, 7)),
    Picture("GIF", "palette", saved("P", "GIF")),
    Picture("GIF", "gray", saved("L", "GIF")),
    Picture("GIF", "animated: the first frame", several("P", "GIF")),
    Picture("GIF", "transparent", saved("P", "GIF", transparency=one("P")), ON_WHITE),
    *(Picture("BMP", kind, saved(mode, "BMP")) for kind, mode in
      (("black and white", "1"), ("gray", "L"), ("palette", "P"), ("RGB", "RGB"))),
    *(Picture("TIFF", kind, saved(mode, "TIFF")) for kind, mode in
      (("black and white", "1"), ("gray", "L"), ("palette", "P"), ("RGB", "RGB"), ("CMYK", "CMYK"))),
    Picture("TIFF", "YCbCr", saved("YCbCr", "TIFF")),
    Picture("TIFF", "compressed", saved("RGB", "TIFF", compression="tiff_lzw")),
    Picture("TIFF", "several pages: the first", several("RGB", "TIFF")),
    *(Picture("TIFF", f"orientation {o}", turned("RGB", "TIFF", o)) for o in ALL),
    Picture("TIFF", "RGBA", saved("RGBA", "TIFF"), ON_WHITE),
    Picture("TIFF", "gray of 16 bits", saved("I;16", "TIFF"), UPPER, DEEP >> 8),
    Picture("TIFF", "gray of 16 bits, white is zero", tiff(16, True), UPPER, DEEP >> 8),
    Picture("TIFF", "gray of 12 bits", tiff(12), UPPER, DEEP >> 8),
    Picture("TIFF", "floating-point numbers", saved("F", "TIFF"), refused=BAD_RANGE),
    Picture("TIFF", "32-bit or signed integers", saved("I", "TIFF"), refused=BAD_RANGE),
    Picture("PPM", "RGB", saved("RGB", "PPM")),
    Picture("PPM", "gray", saved("L", "PPM")),
    Picture("PPM", "gray of 16 bits", pgm16, UPPER, DEEP >> 8),
    Picture("JP2", "RGB", saved("RGB", "JPEG2000")),
    Picture("JP2", "RGBA", saved("RGBA", "JPEG2000"), ON_WHITE),
    Picture("JP2", "gray of 16 bits", saved("I;16", "JPEG2000", irreversible=False), UPPER, DEEP >> 8),
    Picture("EPS", "any", saved("RGB", "EPS"), refused="not an image"),
    Picture("ICO", "any", saved("RGB", "ICO"), refused="not an image"),
    Picture("SVG", "any", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", refused="not an image"),
]  # fmt: skip
