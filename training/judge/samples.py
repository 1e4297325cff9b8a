"""The samples to judge: pictures of a folder or of a prepared set, edits of a prepared set, and those left out."""
from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..data.decode import decode, decode_edit, fit
from ..data.index import EDITS, NAME, CorruptSample, Index, bucket_of
from ..data.pictures import BadPicture, open_picture
from ..data.readers import PICTURE, ending_of
from ..data.sources import files_of


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture, or one edit. key: 16 hex digits of its content's hash. name: for people. source, target: [H, W, 3]
    uint8.

    For an edit, `instruction` is the request, `target` the true edited picture, `captions` the set's captions of the
    two pictures ("" where it has none).
    """

    key: str
    name: str
    source: np.ndarray
    target: np.ndarray | None = None
    instruction: str = ""
    captions: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out, and why."""

    name: str
    reason: str


def too_small(height: int, width: int, resolution: int) -> str:
    return f"{width} x {height} px is smaller than the resolution of {resolution} px"


def rows_first(picture: Tensor) -> np.ndarray:
    """[3, H, W] uint8 -> [H, W, 3]."""
    return picture.permute(1, 2, 0).numpy()


class Pictures:
    """Pictures to reconstruct. place: a folder or fsspec URL with picture files, or one that `sda prepare` filled.

    Iteration gives Sample or Skipped. Raises ValueError where there are no pictures.
    """

    def __init__(self, place: str, resolution: int):
        self.place, self.resolution, self.index = place, resolution, None
        self.fs, self.root, found, _ = files_of(place)
        if NAME in found:
            self.index = Index.read(place)
            self.buckets = self.index.buckets(resolution)
            return
        self.files = [name for name in found if ending_of(name) in PICTURE]
        if not self.files:
            raise ValueError(f"There are no pictures in {place}: give a folder with files of {', '.join(sorted(PICTURE))}.")

    def __len__(self) -> int:
        return len(self.files) if self.index is None else len(self.index)

    def describe(self) -> dict:
        return {"place": str(self.place)} | ({} if self.index is None else {"index": self.index.hash})

    def __iter__(self) -> Iterator[Sample | Skipped]:
        if self.index is None:
            yield from map(self._file, self.files)
            return
        for row in range(len(self.index)):
            yield self._row(row)

    def _file(self, name: str) -> Sample | Skipped:
        try:
            data = self.fs.cat_file(posixpath.join(self.root, name))
            image, _ = open_picture(data)
        except (OSError, BadPicture) as error:
            return Skipped(name, f"unreadable: {getattr(error, 'strerror', None) or error}")
        bucket = bucket_of(image.height, image.width, self.resolution)
        if not any(bucket):
            return Skipped(name, too_small(image.height, image.width, self.resolution))
        return Sample(hashlib.sha256(data).hexdigest()[:16], name, rows_first(fit(image, bucket)))

    def _row(self, row: int) -> Sample | Skipped:
        it, bucket = self.index[row], tuple(self.buckets[row].tolist())
        if not any(bucket):
            return Skipped(it["origin"], too_small(it["height"], it["width"], self.resolution))
        try:
            return self._sample(row, it, bucket)
        except CorruptSample as error:
            return Skipped(it["origin"], f"unreadable: {error}")

    def _sample(self, row: int, it: dict, bucket: tuple[int, int]) -> Sample | Skipped:
        return Sample(it["sha256"].hex()[:16], it["origin"], rows_first(decode(self.index, row, bucket)))


class Edits(Pictures):
    """Edits of a set that `sda prepare-edits` filled."""

    def __init__(self, place: str, resolution: int):
        super().__init__(place, resolution)
        if self.index is None or self.index.kind != EDITS:
            raise ValueError(f"{place} holds pictures without instructions: give a set that `sda prepare-edits` made.")

    def _sample(self, row: int, it: dict, bucket: tuple[int, int]) -> Sample | Skipped:
        if not (it["caption"] or "").strip():
            return Skipped(it["origin"], "it has no instruction")
        source, target, instruction = decode_edit(self.index, row, bucket)
        content = it["sha256"] + it["target_sha256"] + instruction.encode()
        captions = (it["source_caption"] or "", it["target_caption"] or "")
        key = hashlib.sha256(content).hexdigest()[:16]
        return Sample(key, it["origin"], rows_first(source), rows_first(target), instruction, captions)
