"""The samples of a chunk, read one by one. An error of one sample is its own reason and does not end the others."""
from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import posixpath
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from .captions import ENDINGS, caption_in, caption_of
from .files import is_url, locate

PICTURE = {"jpg", "jpeg", "jfif", "png", "webp", "avif", "bmp", "gif", "tif", "tiff", "jp2"}
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
UNREACHABLE = "unreachable"
"""The reason for errors that may pass: a store that does not answer, a driver that is not installed."""
FOR_GOOD = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
NO_NAME = {errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP}


@dataclass
class Found:
    """One sample as it was found. data: {member: bytes}, "" for the picture itself. trouble: (reason, detail) where a
    member could not be read. silent: why its caption could not be read."""

    origin: str
    data: dict[str, bytes] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    trouble: tuple[str, str] | None = None
    silent: str = ""

    def __post_init__(self):  # A file name need not be valid text.
        self.origin = self.origin.encode("utf-8", "replace").decode()


def ending_of(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()


def about(chunk: dict) -> str:
    """The name of a chunk in an error."""
    if "items" in chunk:
        return f"the {len(chunk['items'])} files from {chunk['items'][0][0]} on"
    rows = f", {chunk['rows']} rows from {chunk['first']} on" if "first" in chunk else ""
    return chunk["file"] + (f", row group {chunk['group']}" if "group" in chunk else "") + rows


def read(chunk: dict, wanted: set[int] | None = None) -> Iterator[Found]:
    """The samples of a chunk in its order. wanted: their places in it, from 0; the others are skipped unread."""
    fs, root = locate(chunk["url"])
    try:
        yield from _READERS[chunk["kind"]](fs, root, chunk, wanted)
    except Exception as error:  # The error is of the whole file: the samples found before it stay.
        if wanted is not None:
            raise ValueError(f"{about(chunk)} could be read before and cannot now ({_said(error)}); start the "
                             f"same line again.") from error
        reason, detail = _trouble(error, about(chunk))
        if isinstance(error, (tarfile.TarError, pa.ArrowException)) or type(error) is OSError and error.errno is None:
            reason = "broken tar" if chunk["kind"] == "tar" else "broken table"
        yield Found(about(chunk), trouble=(reason, detail))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def _trouble(error: Exception, path: str) -> tuple[str, str]:
    for_good = isinstance(error, FOR_GOOD) or getattr(error, "errno", None) in NO_NAME
    return "unreadable" if for_good else UNREACHABLE, f"{_said(error)} ({path[:200]})"


def _fetch(fs, path: str, found: Found, member: str = "") -> None:
    try:
        found.data[member] = fs.cat_file(path)
    except Exception as error:  # Stores raise errors of any kind.
        found.trouble = _trouble(error, path)


def _fetch_named(fs, folder: str, name: str, found: Found, member: str = "") -> None:
    """Read a file that a table names: a URL, or a path from the table's folder."""
    local = isinstance(fs, LocalFileSystem)
    path = (os.path.join if local else posixpath.join)(folder, name)
    try:
        if name.startswith("file://") or is_url(name) and not (local and os.path.exists(path)):
            fs, path = locate(name)
    except Exception as error:  # For example an unknown scheme or a missing driver.
        found.trouble = _trouble(error, name)
        return
    _fetch(fs, path, found, member)


def _read_lost(fs, root: str, chunk: dict, wanted: set[int] | None) -> Iterator[Found]:
    for name, reason, detail in chunk["items"]:
        yield Found(name, trouble=(reason, detail))


def _read_files(fs, root: str, chunk: dict, wanted: set[int] | None) -> Iterator[Found]:
    for place, (name, side) in enumerate(chunk["items"]):
        if wanted is not None and place not in wanted:
            continue
        found = Found(name, texts={"caption": chunk.get("captions", {}).get(name, "")})
        _fetch(fs, posixpath.join(root, name), found)
        if side:
            try:
                found.texts["caption"] = caption_in(fs.cat_file(posixpath.join(root, side)), ending_of(side))
            except Exception as error:
                found.silent = _trouble(error, side)[1]
        yield found


def _read_tar(fs, root: str, chunk: dict, wanted: set[int] | None) -> Iterator[Found]:
    file = chunk["file"]
    with fs.open(posixpath.join(root, file), "rb") as stream, tempfile.TemporaryFile() as unpacked:
        plain, trouble = _plain(stream, unpacked)
        tar, members, end = _members(plain)
        by_name: dict[str, list[tarfile.TarInfo]] = {}
        for member in members:
            by_name.setdefault(member.name, []).append(member)
        place = -1
        for member in (member for member in members if ending_of(member.name) in PICTURE):
            place += 1
            if wanted is not None and place not in wanted:
                continue
            time = by_name[member.name].index(member)  # A name may occur twice, with a caption each.
            found = Found(f"{file}/{member.name}" + (f", number {time + 1} of this name" if time else ""))
            try:
                found.data[""] = tar.extractfile(member).read()
            except Exception as error:
                found.trouble = "unreadable", f"{_said(error)} (the tar may end inside of it)"
            found.texts["caption"] = _tar_caption(tar, by_name, member, time, found)
            yield found
        if wanted is None:
            if trouble or end:
                yield Found(file, trouble=("broken tar", trouble or end))
            elif place < 0:
                yield Found(file, trouble=("no pictures", f"a tar of {len(members)} files, none of them a picture"))


def _plain(stream: BinaryIO, unpacked: BinaryIO) -> tuple[BinaryIO, str]:
    """(the plain tar, what went wrong while it was unpacked). A compressed tar is unpacked first, because reading
    jumps."""
    start = stream.read(6)
    stream.seek(0)
    opened = next((opened for mark, opened in PACKED.items() if start.startswith(mark)), None)
    if opened is None:
        return stream, ""
    trouble = ""
    try:
        with opened(stream) as source:
            shutil.copyfileobj(source, unpacked, 1 << 20)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno:  # The disk is at fault, not the file.
            raise
        trouble = _said(error)
    unpacked.seek(0)
    return unpacked, trouble


def _members(stream: BinaryIO) -> tuple[tarfile.TarFile | None, list[tarfile.TarInfo], str]:
    """(a tar, its files and links in their order, why it ends early)."""
    tar, found = None, []
    try:
        tar = tarfile.open(fileobj=stream, mode="r:")
        while (member := tar.next()) is not None:
            if not member.isdir():
                found.append(member)
    except (tarfile.TarError, ValueError, EOFError) as error:
        return tar, found, str(error)
    stream.seek(tar.offset)  # Python's reader takes a damaged header for the end.
    return tar, found, f"a damaged header at byte {tar.offset}" if stream.read(tarfile.BLOCKSIZE).strip(b"\0") else ""


def _tar_caption(tar: tarfile.TarFile, by_name: dict[str, list[tarfile.TarInfo]], picture: tarfile.TarInfo, time: int,
                 found: Found) -> str:
    """The caption from the member with the picture's name, or with WebDataset's key: everything before the first
    dot."""
    folder, name = posixpath.split(picture.name)
    for stem in dict.fromkeys((posixpath.splitext(name)[0], name.split(".")[0])):
        for ending in ENDINGS:
            for written in (ending, ending.upper()):
                sides = by_name.get(posixpath.join(folder, f"{stem}.{written}"))
                if sides:
                    try:
                        return caption_in(tar.extractfile(sides[min(time, len(sides) - 1)]).read(), ending)
                    except Exception as error:
                        found.silent = _said(error)
                        return ""
    return ""


def _read_rows(fs, root: str, chunk: dict, wanted: set[int] | None) -> Iterator[Found]:
    folder = posixpath.dirname(posixpath.join(root, chunk["file"]))
    with fs.open(posixpath.join(root, chunk["file"]), "rb") as stream:
        place = -1
        for number, batch in _batches(pq.ParquetFile(stream), chunk):
            for row in range(batch.num_rows):
                origin = f"{chunk['file']}, row {number + row} of group {chunk['group']}"
                for members in _pictures(batch, row, chunk["members"]):
                    place += 1
                    if wanted is None or place in wanted:
                        yield _row(fs, folder, batch, row, chunk, members, origin)


def _batches(file: pq.ParquetFile, chunk: dict) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number in the row group of its first row, a batch) of the chunk's rows."""
    first, start = chunk.get("first", 0), 0
    size = chunk["rows"] if "first" in chunk else 16  # Names are small, pictures are not.
    columns = [*chunk["members"].values(), *chunk["texts"].values()]
    for batch in file.iter_batches(batch_size=size, row_groups=[chunk["group"]], columns=columns):
        skipped = max(0, first - start)
        inside = batch.slice(skipped, max(0, first + chunk["rows"] - max(first, start)))
        if inside.num_rows:
            yield start + skipped, inside
        start += batch.num_rows
        if start >= first + chunk["rows"]:
            return


def _pictures(batch: pa.RecordBatch, row: int, columns: dict[str, str]) -> Iterator[dict]:
    """{member: value} of each sample of a row. Each picture of a list is a sample."""
    values = {member: batch.column(column)[row].as_py() for member, column in columns.items()}
    if isinstance(values[""], list):
        yield from ({"": value} for value in values[""] or [None])
    else:
        yield values


def _row(fs, folder: str, batch: pa.RecordBatch, row: int, chunk: dict, members: dict, origin: str) -> Found:
    name = members[""]
    found = Found(origin if isinstance(name, (bytes, dict)) or name in (None, "") else str(name))
    for member, value in members.items():
        if not isinstance(value, dict):
            value = {"bytes" if isinstance(value, bytes) else "path": value}
        if value.get("bytes") is not None:
            found.data[member] = value["bytes"]
        elif value.get("path"):
            _fetch_named(fs, folder, str(value["path"]), found, member)
        elif member != "mask":
            found.trouble = "unreadable", f"column {chunk['members'][member]} is empty"
    for ours, column in chunk["texts"].items():
        try:
            found.texts[ours] = caption_of(batch.column(column)[row].as_py())
        except ValueError as error:  # The bytes are not text.
            found.texts[ours], found.silent = "", _said(error)
    return found


_READERS = {"files": _read_files, "tar": _read_tar, "rows": _read_rows, "lost": _read_lost}
