"""The pictures that `sda invert` fits, read from any source, and the names of their files."""
from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ...kernels.embedding_file import SUFFIX
from ..data.decode import fit
from ..data.index import bucket_of
from ..data.pictures import BadPicture, open_picture
from ..data.readers import Found, read

THUMBNAIL = 256
"""Longer side of the picture in an embedding's file, in pixels."""
_ODD = re.compile(r"[^\w .,()+=@-]")
_LONGEST = 200  # bytes of a name; file systems take 255


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture to fit. name: in its source. file: of its embedding, from the output folder. pixels: [3, H, W] uint8,
    cropped to its bucket. begin: the file of the embedding that its fit goes on from, "" for the run's start."""

    name: str
    file: str
    sha256: str
    caption: str
    pixels: Tensor
    begin: str = ""

    def thumbnail(self) -> bytes:
        """A small JPEG of the pixels."""
        image, stream = Image.fromarray(self.pixels.permute(1, 2, 0).numpy()), io.BytesIO()
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(stream, "JPEG", quality=85)
        return stream.getvalue()


@dataclass(frozen=True)
class LeftOut:
    """A picture that is not fitted, and why. reason: one word or two."""

    picture: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Done:
    """A picture whose embedding is there."""

    file: str


def pictures(chunks: Iterable[dict], resolution: int, there: dict[str, str],
             captioned: bool) -> Iterator[Picture | LeftOut | Done]:
    """Every sample of the chunks of a source, in its order.

    there: {file: sha256 of the picture it was fitted to}; such a picture is not decoded. captioned: whether a picture
    without a caption is left out.
    """
    for name, found in named(chunks):
        if found.trouble:
            yield LeftOut(name, *found.trouble)
            continue
        data, file, caption = found.data[""], file_of(name), (found.texts.get("caption") or "").strip()
        sha256 = hashlib.sha256(data).hexdigest()
        if there.get(file) == sha256:
            yield Done(file)
        elif captioned and not caption:
            yield LeftOut(name, "no caption", found.silent or "there is no text beside it, and the fit begins with it")
        else:
            yield opened(name, file, sha256, caption, data, resolution)


def opened(name: str, file: str, sha256: str, caption: str, data: bytes, resolution: int) -> Picture | LeftOut:
    try:
        image, _ = open_picture(data)
    except BadPicture as error:
        return LeftOut(name, error.reason, str(error))
    bucket = bucket_of(image.height, image.width, resolution)
    if not any(bucket):
        return LeftOut(name, "small", f"{image.width} x {image.height} px fill no bucket of {resolution} px")
    return Picture(name, file, sha256, caption, fit(image, bucket))


def named(chunks: Iterable[dict]) -> Iterator[tuple[str, Found]]:
    """Every sample with a name of its own: a row of a table may hold several pictures, a table may name one twice."""
    times: Counter[str] = Counter()
    for chunk in chunks:
        for found in read(chunk):
            times[found.origin] += 1
            yield found.origin + (f", number {times[found.origin]}" if times[found.origin] > 1 else ""), found


def file_of(name: str) -> str:
    """The file of a picture's embedding, below the output folder: the picture's name and the ending of embeddings.
    Names that no file can have everywhere are changed, and get a hash so that they stay apart."""
    parts = []
    for part in name.split("/"):
        part = _ODD.sub("_", part).encode()[:_LONGEST].decode("utf-8", "ignore").strip(" .")
        if part:
            parts.append(part)
    made = "/".join(parts) or "picture"
    return (made if made == name else f"{made}-{hashlib.sha256(name.encode()).hexdigest()[:8]}") + SUFFIX


def batches(found: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    """Pictures of one bucket, `size` at once. What is left of each bucket comes at the end."""
    waiting: dict[tuple[int, ...], list[Picture]] = {}
    for picture in found:
        batch = waiting.setdefault(tuple(picture.pixels.shape), [])
        batch.append(picture)
        if len(batch) == size:
            yield waiting.pop(tuple(picture.pixels.shape))
    yield from waiting.values()
