"""Untrusted picture files: one whole still picture as 8-bit sRGB, or a reason why not."""
from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageCms, ImageOps

# Never Pillow's whole list: some of its readers start other programs.
FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "AVIF": "avif", "BMP": "bmp", "TIFF": "tif", "GIF": "gif",
           "JPEG2000": "jp2"}
MAX_PIXELS = 178_956_970
"""Pictures of more pixels are refused before they are unpacked; Pillow's own limit."""
VERSION = "1"
"""Changes whenever the same bytes would give other pixels; part of every cache's key."""


class BadPicture(ValueError):
    """A file that is no usable picture. reason: one word for the statistics; str(): one sentence."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def open_picture(data: bytes, least: int = 0) -> tuple[Image.Image, str]:
    """(the picture as 8-bit sRGB, upright, the usual ending of its format). Alpha goes over white, 16 bits to 8, embedded
    colour profiles and CMYK to sRGB.

    least: where not 0, a JPEG may be unpacked at a fraction of its size whose sides are at least this many pixels.
    Raises BadPicture for everything else than one whole still picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_known())
    except Image.UnidentifiedImageError:
        raise BadPicture("not a picture", f"not a picture of a known format ({', '.join(sorted(set(FORMATS.values())))})") from None
    except Image.DecompressionBombError:
        raise BadPicture("too large", f"more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # Readers of hostile bytes raise anything.
        raise BadPicture("broken", f"{type(error).__name__}: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadPicture("too large", f"{image.width} x {image.height} are more than {MAX_PIXELS} pixels")
    try:
        ending = FORMATS[image.format]
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            raise BadPicture("animated", f"{image.n_frames} frames")
        if least:
            image.draft(None, (least, least))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image)), ending
    except BadPicture:
        raise
    except Exception as error:
        raise BadPicture("broken", f"{type(error).__name__}: {error}") from None


def _known() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit sRGB over white."""
    profile = image.info.get("icc_profile")
    if image.mode == "F":
        raise BadPicture("floating point", "its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow would clip them.
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("P", "PA", "LA", "La", "RGBa", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(found):
                return ImageCms.profileToProfile(image, found, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # A broken profile, or one of another kind of colour: the plain conversion shows the picture.
    return image.convert("RGB")
