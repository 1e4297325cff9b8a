"""The index of prepared samples: one parquet row each. Every picture is one ranged read of a tar shard."""
from __future__ import annotations

import hashlib
import math
import posixpath
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .files import locate

FORMAT = "1"
NAME = "index.parquet"
PICTURES, EDITS = "pictures", "edits"
# These are the aspects of cameras and screens. Few and full buckets are worth more than a little less cropping.
ASPECTS = (1, 4 / 3, 3 / 2, 16 / 9, 2)
STEP = 32


@lru_cache
def buckets(resolution: int) -> tuple[tuple[int, int], ...]:
    """The buckets (height, width) in pixels of one resolution: about resolution ** 2 pixels each, sides multiples of
    32, aspects from 1:2 to 2:1."""
    sides = range(STEP, 2 * resolution + 1, STEP)
    grid = [(h, w) for h in sides for w in sides if h <= w <= 2 * h]
    if not grid:
        raise ValueError(f"A resolution of {resolution} px is too small; choose at least {STEP}.")
    wide = {min(grid, key=lambda b, a=a: abs(math.log(b[1] / b[0] / a)) + abs(math.log(b[0] * b[1] / resolution ** 2)))
            for a in ASPECTS}
    return tuple(sorted(wide | {(w, h) for h, w in wide}))


def bucket_of(height: int, width: int, resolution: int) -> tuple[int, int]:
    """The bucket nearest in aspect among those that the picture fills without enlargement. (0, 0) where its shorter
    side is below the resolution."""
    if min(height, width) < resolution:
        return 0, 0
    filled = [b for b in buckets(resolution) if b[0] <= height and b[1] <= width]
    return min(filled, key=lambda b: abs(math.log(b[0] * width / (b[1] * height))))


def schema(kind: str, resolutions: Sequence[int]) -> pa.Schema:
    """The columns of an index. Offsets and lengths are bytes of the shard. Width and height are pixels after the EXIF
    orientation. sha256 is of the file as found. `bucket_R` is (height, width), (0, 0) where the picture is smaller than
    R. In an index of edits the unnamed picture is the source, `caption` is the instruction, and a mask of length 0
    means none."""
    pair = [("target_offset", pa.int64()), ("target_length", pa.int64()), ("target_sha256", pa.binary(32)),
            ("mask_offset", pa.int64()), ("mask_length", pa.int64()),
            ("source_caption", pa.large_string()), ("target_caption", pa.large_string())]
    return pa.schema([
        ("key", pa.large_string()), ("origin", pa.large_string()), ("shard", pa.large_string()),
        ("offset", pa.int64()), ("length", pa.int64()), ("sha256", pa.binary(32)),
        ("width", pa.int32()), ("height", pa.int32()), ("caption", pa.large_string()),
        *(pair if kind == EDITS else []),
        *((f"bucket_{r}", pa.list_(pa.int16(), 2)) for r in resolutions),
    ], metadata={"format": FORMAT, "kind": kind})


def is_ours(url: str) -> bool:
    """Whether the index.parquet in a folder is an index, not a stranger's table of that name."""
    fs, root = locate(url)
    with fs.open(posixpath.join(root, NAME), "rb") as stream:
        return b"format" in (pq.read_schema(stream).metadata or {})


class Index(Sequence):
    """The samples of one prepared set. `index[i]` is row i as a dict, `rows` their number.

    url     where the set lies: any fsspec URL of its folder
    kind    "pictures" or "edits"
    hash    of what the samples are (pictures, captions, buckets), whatever the shards they lie in
    """

    def __init__(self, url: str, table: pa.Table):
        record = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        if "format" not in record:
            raise ValueError(f"{url} holds a parquet file that is no index of ours; run `sda prepare` first.")
        if record["format"] != FORMAT:
            raise ValueError(f"The index of {url} has format {record['format']}, newer than this version; update "
                             "the pack.")
        self.url, self.kind, self.table = url, record["kind"], table.combine_chunks()
        self.fs, self.root = locate(url)
        self.resolutions = tuple(int(n[7:]) for n in table.column_names if re.fullmatch(r"bucket_\d+", n))

    @classmethod
    def read(cls, url: str) -> Index:
        """url: the folder that `sda prepare` filled, local or of an object store."""
        url = str(url).rstrip("/")
        fs, root = locate(url)
        file = posixpath.join(root, NAME)
        if not fs.exists(file):
            raise ValueError(f"There is no {NAME} in {url}; run `sda prepare` to its end first.")
        with fs.open(file, "rb") as stream:
            return cls(url, pq.read_table(stream))

    def __getstate__(self):  # Every process opens its own file system.
        return self.url, self.table

    def __setstate__(self, state):
        self.__init__(*state)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> dict:
        if not 0 <= row < len(self):
            raise IndexError(f"The index of {self.url} has {len(self)} rows, and no row {row}.")
        return self.table.slice(row, 1).to_pylist()[0]

    @property
    def rows(self) -> int:
        return len(self)

    def buckets(self, resolution: int) -> np.ndarray:
        """[rows, 2] int16: height and width of every row's bucket, (0, 0) where the picture is smaller than the
        resolution."""
        if resolution not in self.resolutions:
            known = ", ".join(map(str, self.resolutions))
            raise ValueError(f"The index of {self.url} has no buckets at {resolution} px, only at {known}; "
                             f"choose one of these or prepare again with --resolutions.")
        column = self.table.column(f"bucket_{resolution}").combine_chunks()
        return column.flatten().to_numpy().reshape(-1, 2)

    @cached_property
    def hash(self) -> str:
        digest = hashlib.sha256(f"{FORMAT} {self.kind} {len(self)}".encode())
        names = ("sha256", "target_sha256", "mask_length", "caption", *(f"bucket_{r}" for r in self.resolutions))
        for name in names:
            if name in self.table.column_names:
                digest.update(name.encode())
                for array in column_bytes(self.table.column(name)):
                    digest.update(array)
        return digest.hexdigest()

    def read_member(self, row: int, member: str = "") -> bytes:
        """The bytes of one picture, by one ranged read. member: "", "target" or "mask". Raises CorruptSample where the
        shard does not hold what was prepared."""
        it, prefix = self[row], f"{member}_" if member else ""
        start, length = it[f"{prefix}offset"], it[f"{prefix}length"]
        try:
            data = self.fs.cat_file(posixpath.join(self.root, it["shard"]), start, start + length)
        except FileNotFoundError:
            raise CorruptSample(self, row, "the shard is missing") from None
        if len(data) < length:
            raise CorruptSample(self, row, f"the shard ends after {len(data)} of the picture's {length} bytes")
        wanted = it.get(f"{prefix}sha256")
        if wanted is not None and hashlib.sha256(data).digest() != wanted:
            raise CorruptSample(self, row, "its bytes have changed since they were prepared")
        return data


class CorruptSample(ValueError):
    """A prepared sample that can no longer be read. The caller stops or skips it (`Plan.spare`)."""

    def __init__(self, index: Index, row: int, what: str):
        it = index[row]
        super().__init__(f"Row {row} of {index.url} ('{it['key']}', from {it['origin']}) in {it['shard']} at byte "
                         f"{it['offset']} is corrupt: {what}; restore the shard or prepare the set again.")
        self.row, self.shard, self.key = row, it["shard"], it["key"]

    def __reduce__(self):
        return _revive, (str(self), dict(self.__dict__))


def _revive(text: str, state: dict) -> CorruptSample:
    error = CorruptSample.__new__(CorruptSample)
    ValueError.__init__(error, text)
    error.__dict__.update(state)
    return error


def column_bytes(column: pa.ChunkedArray):
    """The values of a column as buffers that do not depend on its chunks."""
    array = column.combine_chunks()
    if pa.types.is_large_string(array.type):
        yield np.ascontiguousarray(pc.binary_length(array).to_numpy(zero_copy_only=False))
        array = array.cast(pa.large_binary())
        begin, end = (np.frombuffer(array.buffers()[1], np.int64)[array.offset + k] for k in (0, len(array)))
        yield memoryview(array.buffers()[2] or b"")[begin:end]
    elif pa.types.is_fixed_size_binary(array.type):
        width = array.type.byte_width
        yield memoryview(array.buffers()[1])[array.offset * width:(array.offset + len(array)) * width]
    elif pa.types.is_fixed_size_list(array.type):
        yield np.ascontiguousarray(array.flatten().to_numpy())
    else:
        yield np.ascontiguousarray(array.to_numpy())
