"""Untrusted picture files: each gives one whole still picture as 8-bit sRGB, or a reason why not."""
from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, ImageCms

from .bare import bare

# Pillow's whole list is never used: some of its readers start other programs.
FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "AVIF": "avif", "BMP": "bmp", "TIFF": "tif",
           "GIF": "gif", "JPEG2000": "jp2"}
MAX_PIXELS = 178_956_970
"""Pictures with more pixels are refused before they are unpacked. This is Pillow's own limit."""
VERSION = "2"
"""The number changes whenever the same bytes would give other pixels. It is part of every cache's key."""
ORIENTATION = 0x0112
# EXIF's orientation -> the operation that makes the picture upright
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}
SIDEWAYS = {UPRIGHT[number] for number in (5, 6, 7, 8)}
BITS = (8, 10, 12, 16, 24, 31, 32)
"""Depths of integer pictures: scanners and cameras keep 10 or 12 bits in 16, instruments 31 in 32."""
T = TypeVar("T")


class BadPicture(ValueError):
    """A file that is not a usable picture. reason: one word for the statistics; str(): one sentence."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def open_picture(data: bytes, least: tuple[int, int] | None = None) -> tuple[Image.Image, str]:
    """(the picture as 8-bit sRGB, upright, the usual ending of its format). Alpha is composited over white, integers of
    other depths become 8 bits, embedded colour profiles and CMYK become sRGB.

    least: (height, width) in pixels. A JPEG may then be unpacked at a fraction of its size that still has as many.
    Raises BadPicture for everything but one whole still picture.
    """
    def unpack(image: Image.Image) -> tuple[Image.Image, str]:
        ending = FORMATS[image.format]
        if least and ending == "jpg":
            height, width = least[::-1] if _turn(image) in SIDEWAYS else least
            image.draft(None, (width, height))
        image.load()
        turn = _turn(image)
        return to_rgb(image if turn is None else image.transpose(turn)), ending

    return _read(data, unpack)


def picture_size(data: bytes) -> tuple[tuple[int, int], str]:
    """((width, height) of the upright picture in pixels, the usual ending of its format), for exactly the files that
    `open_picture` takes. Every byte is read. Of a JPEG an eighth of the pixels is made, which takes half the time.
    """
    def measure(image: Image.Image) -> tuple[tuple[int, int], str]:
        ending, size = FORMATS[image.format], image.size
        if ending == "jpg":
            image.draft("L", (1, 1))
            image.load()
        else:
            image.load()
            size = image.size  # Pillow rotates a TIFF as it loads
            to_rgb(image)
        return size[::-1] if _turn(image) in SIDEWAYS else size, ending

    return _read(data, measure)


def _read(data: bytes, unpack: Callable[[Image.Image], T]) -> T:
    try:
        return _unpacked(data, unpack)
    except BadPicture as error:
        if error.reason not in ("broken", "not a picture"):
            raise
        for pixels in bare(data):
            try:
                return _unpacked(pixels, unpack)
            except BadPicture:
                pass
        raise


def _unpacked(data: bytes, unpack: Callable[[Image.Image], T]) -> T:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_known())
            if image.width * image.height > MAX_PIXELS:
                raise BadPicture("too large", f"{image.width} x {image.height} are more than {MAX_PIXELS} pixels")
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise BadPicture("animated", f"{image.n_frames} frames")
            return unpack(image)
    except BadPicture:
        raise
    except Image.UnidentifiedImageError:
        known = ", ".join(sorted(set(FORMATS.values())))
        raise BadPicture("not a picture", f"not a picture of a known format ({known})") from None
    except Image.DecompressionBombError:
        raise BadPicture("too large", f"more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # Readers may raise anything on hostile bytes.
        raise BadPicture("broken", f"{type(error).__name__}: {error}") from None


def _known() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The operation that makes a picture upright; None where its EXIF is missing or torn."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION))
    except Exception:  # As above, and the pixels are good.
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as 8-bit sRGB over white."""
    profile = image.info.get("icc_profile")
    if image.mode == "F":
        raise BadPicture("floating point", "its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):
        image = _eight_bits(np.asarray(image))
    if image.mode in ("P", "PA", "LA", "La", "RGBa", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(found):
                return ImageCms.profileToProfile(image, found, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # A broken profile, or one of another kind of colour: the plain conversion is used.
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy


def _eight_bits(grey: np.ndarray) -> Image.Image:
    """Integers as 8 bits, by the smallest usual depth that holds them. Pillow would clip them at 255."""
    if grey.dtype == np.int32:
        grey = grey.view(np.uint32)  # Pillow keeps 32 bits without a sign so
    most = next(2 ** bits - 1 for bits in BITS if grey.max(initial=0) < 2 ** bits)
    return Image.fromarray((grey * (255 / most)).round().astype(np.uint8))
