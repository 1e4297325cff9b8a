"""From bytes to pixels: untrusted picture files to 8-bit sRGB, and rows of the index to tensors of their bucket."""
from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from .index import Index

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


class CorruptSample(ValueError):
    """A prepared sample that can no longer be read; the caller stops, or skips it (`Plan.spare`)."""

    def __init__(self, index: Index, row: int, what: str):
        it = index[row]
        super().__init__(f"Row {row} of {index.url} ('{it['key']}', from {it['origin']}) in {it['shard']} at byte {it['offset']} "
                         f"is corrupt: {what}; restore the shard or prepare the set again.")
        self.row, self.shard, self.key = row, it["shard"], it["key"]

    def __reduce__(self):
        return _revive, (str(self), dict(self.__dict__))


def _revive(text: str, state: dict) -> CorruptSample:
    error = CorruptSample.__new__(CorruptSample)
    ValueError.__init__(error, text)
    error.__dict__.update(state)
    return error


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


def fit(image: Image.Image, bucket: tuple[int, int]) -> Tensor:
    """The picture resized to cover the bucket (height, width) and cropped about its centre: [3, H, W] float32 in [0, 1]."""
    height, width = bucket
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def decode(index: Index, row: int, bucket: tuple[int, int], member: str = "") -> Tensor:
    """The picture of a row in its bucket (height, width): [3, H, W] float32 in [0, 1]. Raises CorruptSample."""
    try:
        # Twice the bucket leaves the fine resampling to Lanczos.
        return fit(open_picture(index.read_member(row, member), 2 * max(bucket))[0], bucket)
    except BadPicture as error:
        raise CorruptSample(index, row, str(error)) from None


def decode_edit(index: Index, row: int, bucket: tuple[int, int]) -> tuple[Tensor, Tensor, str]:
    """(source, target, instruction) of a row of an index of edits; pictures as `decode` gives them."""
    if index.kind != "edits":
        raise ValueError(f"{index.url} holds pictures, not edits; prepare the edits with `sda prepare-edits`.")
    return decode(index, row, bucket), decode(index, row, bucket, "target"), index[row]["caption"]
