"""The choice of the samples (of equal content the first) and their division into shards. It holds only numbers of the
samples. Names and captions stay in the marks of the workers and are read from there when needed."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .files import read_table, whole_file
from .shards import MEMBERS

READ = ["reason", "detail", "same", "caption", *(f"{member}_length" for member in MEMBERS)]
Runs = list[tuple[int, int]]
"""Ascending numbers as ranges [first, end)."""


@dataclass(eq=False)
class Choice:
    """A sample's number is its place in the source; chunk n has those of [starts[n], starts[n + 1]).

    kept: [K] numbers, ascending. sizes: [K] bytes. lends: {kept number: an equal sample's number, whose caption it
    takes}. same: {dropped number: the kept one that it equals}. reasons: how many were dropped for each reason, most
    frequent first. captioned, silent: how many kept ones have a caption, and how many have one that could not be read.
    """

    fs: object
    marks: list[str]
    starts: np.ndarray
    kept: np.ndarray
    sizes: np.ndarray
    lends: dict[int, int]
    same: dict[int, int]
    reasons: dict[str, int]
    captioned: int
    silent: int

    @property
    def count(self) -> int:
        return int(self.starts[-1])

    @property
    def bytes(self) -> int:
        return int(self.sizes.sum())

    def shards(self, most: int) -> Iterator[tuple[int, int]]:
        """[first, end) in `kept` of each shard. Shards begin less than `most` bytes after whole multiples of it."""
        shard = (np.cumsum(self.sizes) - self.sizes) // most
        starts = np.flatnonzero(np.diff(shard, prepend=-1)).tolist()
        return zip(starts, [*starts[1:], len(self.kept)])

    def runs(self, first: int, end: int) -> Iterator[tuple[int, Runs]]:
        """(chunk, the places of the samples kept[first:end] in it)."""
        numbers = self.kept[first:end]
        chunks = np.searchsorted(self.starts, numbers, "right") - 1
        for chunk in np.unique(chunks).tolist():
            yield chunk, ranges(numbers[chunks == chunk] - self.starts[chunk])

    def borrowed(self, first: int, end: int) -> dict[str, str]:
        """{place in kept[first:end]: caption} of the samples that take another's caption."""
        places = {place: self.lends[n] for place, n in enumerate(self.kept[first:end].tolist()) if n in self.lends}
        texts = self._texts("caption", list(places.values()))
        return {str(place): texts[number] for place, number in places.items()}

    def write_dropped(self, fs, path: str) -> None:
        """Write a table of origin, reason and detail of every dropped sample, chunk by chunk."""
        origins = self._texts("origin", sorted(set(self.same.values())))
        schema = pa.schema([("origin", pa.large_string()), ("reason", pa.string()), ("detail", pa.large_string())])
        with whole_file(fs, path) as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
            for start, mark in zip(self.starts.tolist(), self.marks):
                rows = [self._dropped(start + place, row, origins)
                        for place, row in enumerate(read_table(self.fs, mark, schema.names).to_pylist())
                        if row["reason"] or start + place in self.same]
                if rows:
                    writer.write_table(pa.Table.from_pylist(rows, schema))

    def _dropped(self, number: int, row: dict, origins: dict[int, str]) -> dict:
        if number in self.same:
            row = row | {"reason": "duplicate", "detail": f"the same as {origins[self.same[number]]}"}
        return row

    def _texts(self, column: str, numbers: list[int]) -> dict[int, str]:
        by_chunk: dict[int, list[int]] = {}
        for number in numbers:
            by_chunk.setdefault(int(np.searchsorted(self.starts, number, "right")) - 1, []).append(number)
        found = {}
        for chunk, wanted in by_chunk.items():
            texts = read_table(self.fs, self.marks[chunk], [column]).column(column)
            found |= {number: texts[number - int(self.starts[chunk])].as_py() for number in wanted}
        return found


def ranges(numbers: np.ndarray) -> Runs:
    """numbers: ascending, at least one."""
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]


def choose(fs, marks: list[str]) -> Choice:
    """Choose the samples. Of equal content the first in the source's order is kept, with the first caption that any of
    them has."""
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(lambda mark: _numbers(read_table(fs, mark, READ)), marks))
    starts = np.cumsum([0, *(len(part) for part in parts)])
    table = pa.concat_tables(parts).combine_chunks()
    good = np.flatnonzero(pc.equal(table["reason"], "").to_numpy(zero_copy_only=False))
    captioned, silent = (table[name].to_numpy(zero_copy_only=False)[good] for name in ("captioned", "silent"))
    same = table["same"].combine_chunks().take(pa.array(good))
    content = same.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    _, first = np.unique(content, return_index=True)  # numbered as they appear, so first[c] is the first of content c
    speaking, tells = np.unique(content[captioned], return_index=True)
    teller = np.full(len(first), -1)
    teller[speaking] = np.flatnonzero(captioned)[tells]
    lent = np.flatnonzero((teller >= 0) & (teller != first) & ~captioned[first])
    again = np.setdiff1d(np.arange(len(good)), first)
    counts = pc.value_counts(table["reason"]).to_pylist()
    reasons = Counter({row["values"]: row["counts"] for row in counts if row["values"]})
    if len(again):
        reasons["duplicate"] += len(again)
    kept = np.sort(first)
    return Choice(fs, marks, starts, good[kept], table["size"].to_numpy()[good[kept]],
                  dict(zip(good[first[lent]].tolist(), good[teller[lent]].tolist())),
                  dict(zip(good[again].tolist(), good[first[content[again]]].tolist())),
                  dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
                  int((teller >= 0).sum()), int((silent[first] & (teller < 0)).sum()))


def _numbers(table: pa.Table) -> pa.Table:
    """The columns of a table of SCANNED that decide, without its texts."""
    size = sum(table[f"{member}_length"].fill_null(0).to_numpy() for member in MEMBERS)
    kept = pc.equal(table["reason"], "")
    return pa.table({"reason": table["reason"], "same": table["same"], "size": pa.array(size, pa.int64()),
                     "captioned": pc.greater(pc.binary_length(table["caption"].fill_null("")), 0),
                     "silent": pc.and_(kept, pc.greater(pc.binary_length(table["detail"]), 0))})
