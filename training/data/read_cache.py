"""An encoder's outputs for a set, read row by row: safetensors shards with a parquet index.

An entry's key is its content: the sha256 of the picture and the bucket it was cropped to. A folder's name has the
encoder, the hash of its weights and the version of the decoding, so a stale cache is never found.
"""
from __future__ import annotations

import json
import posixpath
import struct
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from .files import digest, listed, locate, read_table
from .index import NAME, CorruptSample, Index, column_bytes
from .pictures import VERSION

ENTRIES = pa.schema([("key", pa.binary(36)), ("shard", pa.string()), ("place", pa.int32()), ("size", pa.int64())])
"""size: bytes of the whole shard."""
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class Part:
    """One encoder's share of a cache.

    name    "vae" (tensors "mean" and "std" of Flux's latents) or a vision tower's id ("features", or "hidden")
    hash    sha256 of the encoder's weights
    before  0, or the number of a tower's last blocks that stay out; the cache then has the hidden state before them
    """

    name: str
    hash: str
    before: int = 0

    @property
    def folder(self) -> str:
        return f"{self.name}{f'-before-{self.before}' if self.before else ''}-{digest(VERSION, asdict(self))[:12]}"


def keys_of(index: Index, resolution: int, member: str = "") -> tuple[np.ndarray, pa.Array]:
    """(rows that fill the resolution, their keys). member: "" or, of edits, "target"."""
    sizes = index.buckets(resolution)
    rows = np.flatnonzero(sizes[:, 0])
    column = index.table.column(f"{member}_sha256" if member else "sha256")
    shas = np.frombuffer(b"".join(column_bytes(column)), np.uint8).reshape(-1, 32)
    keys = np.concatenate([shas, np.ascontiguousarray(sizes.astype("<i2")).view(np.uint8)], 1)[rows]
    return rows, pa.FixedSizeBinaryArray.from_buffers(pa.binary(36), len(rows), [None, pa.py_buffer(keys.tobytes())])


class Cache:
    """One encoder's outputs for the rows of an index. Raises ValueError where one is missing.

    url     the folder that `sda cache` filled
    index   the set, or a part of it
    """

    def __init__(self, url: str, index: Index, part: Part, resolutions: tuple[int, ...]):
        self.fs, root = locate(str(url).rstrip("/"))
        self.index, self.part, self.root = index, part, posixpath.join(root, part.folder)
        remedy = "run `sda cache` with the same data, encoders and resolutions"
        try:
            self.entries = read_table(self.fs, posixpath.join(self.root, NAME))
        except FileNotFoundError:
            raise ValueError(f"{url} holds nothing of {part.name} with these weights ({part.folder}); "
                             f"{remedy}.") from None
        members = ("", "target") if index.kind == "edits" else ("",)
        self.where: dict[tuple[int, str], np.ndarray] = {}
        for resolution, member in ((r, m) for r in resolutions for m in members):
            rows, keys = keys_of(index, resolution, member)
            found = pc.index_in(keys, self.entries.column("key").combine_chunks()).fill_null(-1).to_numpy()
            if (found < 0).any():
                raise ValueError(f"The cache {url} lacks {int((found < 0).sum())} of {len(rows)} entries of "
                                 f"{part.name} at {resolution} px; {remedy}.")
            places = np.full(len(index), -1, np.int64)
            places[rows] = found
            self.where[resolution, member] = places
        self._verify(url, remedy)
        self.headers: dict[str, tuple[int, dict]] = {}

    def _verify(self, url: str, remedy: str) -> None:
        there = listed(self.fs, posixpath.join(self.root, "shards"))
        used = np.unique(np.concatenate([places[places >= 0] for places in self.where.values()]))
        part = self.entries.take(pa.array(used)).group_by(["shard", "size"]).aggregate([]).to_pylist()
        wrong = [row["shard"] for row in part if there.get(row["shard"]) != row["size"]]
        if wrong:
            raise ValueError(f"{len(wrong)} shards of {self.part.name} in {url} are missing or cut short, such as "
                             f"{wrong[0]}; {remedy}.")

    def read(self, row: int, resolution: int, member: str = "") -> dict[str, Tensor]:
        """The tensors of one row at a resolution, on the CPU in the dtype in which they are stored. member: "" or
        "target"."""
        entry = int(self.where[resolution, member][row])
        if entry < 0:
            raise ValueError(f"Row {row} of {self.index.url} is smaller than {resolution} px, so the cache has no "
                             "entry for it.")
        name, place = self.entries.column("shard")[entry].as_py(), self.entries.column("place")[entry].as_py()
        path = posixpath.join(self.root, "shards", name)
        start, tensors = self._header(path)
        found = {}
        for key, it in tensors.items():
            first, end = it["data_offsets"]
            stride = (end - first) // it["shape"][0]
            at = start + first + place * stride
            data = self.fs.cat_file(path, at, at + stride)
            if len(data) < stride:
                raise CorruptSample(self.index, row, f"the cached shard {path} ends early")
            found[key] = torch.frombuffer(bytearray(data), dtype=DTYPES[it["dtype"]]).view(it["shape"][1:])
        return found

    def _header(self, path: str) -> tuple[int, dict]:
        """(offset of the data, {tensor: dtype, shape, offsets}) of a safetensors file."""
        if path not in self.headers:
            length, = struct.unpack("<Q", self.fs.cat_file(path, 0, 8))
            record = json.loads(self.fs.cat_file(path, 8, 8 + length))
            self.headers[path] = 8 + length, {k: v for k, v in record.items() if k != "__metadata__"}
        return self.headers[path]
