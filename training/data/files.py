"""Files on local disks and object stores, written so that a killed writer leaves nothing that looks whole."""
from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(://|::)")  # at least two letters: one letter is a Windows drive


def is_url(place: str) -> bool:
    """Whether fsspec reads the place, with its `::`, `?` and `#`. A place that is, or could be, on this machine is a
    path."""
    here = os.path.exists(place) or os.path.exists(os.path.dirname(place) or ".")
    return bool(SCHEME.match(place)) and not place.startswith("file://") and not here


def locate(place: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """(file system, path on it). A path of this machine is taken literally."""
    if is_url(place):
        return fsspec.url_to_fs(place)
    fs = fsspec.filesystem("file")
    return fs, fs._strip_protocol(place)


def absolute(place: str) -> str:
    """The same place for every process: a URL as it is, a local path from its root. Links are not resolved."""
    place = str(place)
    if is_url(place) or place.startswith("file://"):
        return place.rstrip("/")
    return str(Path(place).expanduser().absolute())


@contextmanager
def whole_file(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[BinaryIO]:
    """A file to write. It appears under its name only once it is whole: a local disk renames it into place, a store
    shows an object when its upload has ended."""
    local = isinstance(fs, LocalFileSystem)
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    staged = f"{path}.{uuid.uuid4().hex}.writing" if local else path
    try:
        with fs.open(staged, "wb") as stream:
            yield stream
        if local:
            Path(staged).replace(path)
    except BaseException:
        if fs.exists(staged):  # Closing a store's writer commits what it has.
            fs.rm_file(staged)
        raise


def write_table(fs: fsspec.AbstractFileSystem, path: str, table: pa.Table) -> None:
    with whole_file(fs, path) as stream:
        pq.write_table(table, stream, compression="zstd")


def read_table(fs: fsspec.AbstractFileSystem, path: str, columns: list[str] | None = None) -> pa.Table:
    with fs.open(path, "rb") as stream:
        return pq.read_table(stream, columns=columns)


def write_json(fs: fsspec.AbstractFileSystem, path: str, data: object) -> None:
    with whole_file(fs, path) as stream:
        stream.write((json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


def digest(*what: object) -> str:
    """A hash of anything that JSON can express."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def listed(fs: fsspec.AbstractFileSystem, folder: str) -> dict[str, int]:
    """{name: size in bytes} of the files of a folder. Empty where there is no folder."""
    try:
        return {posixpath.basename(f["name"]): f["size"] for f in fs.ls(folder, detail=True, refresh=True)
                if f["type"] == "file"}
    except FileNotFoundError:
        return {}


def sweep(fs: fsspec.AbstractFileSystem, folder: str) -> None:
    """Remove the files that killed writers have left in a folder."""
    for name in listed(fs, folder):
        if name.endswith(".writing"):
            fs.rm_file(posixpath.join(folder, name))
