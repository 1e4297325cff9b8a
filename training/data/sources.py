"""Sources of samples: folders of pictures, tars as img2dataset writes them, parquet files of paths or of pictures.

`listing` cuts a source into chunks, small JSON records that any worker can `read` by itself. Chunks and their samples
are in the order of the sorted names, so the order does not depend on who reads them.
"""
from __future__ import annotations

import os
import posixpath
import re
import stat
from collections import deque
from collections.abc import Iterator

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from . import captions
from .files import locate
from .readers import PICTURE, ending_of, read

__all__ = ["count_of", "files_of", "listing", "read", "row_chunks", "stamp", "weigh"]

TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
ROWS = 64
"""Loose picture files per chunk."""
NAMED = 512
"""Rows per chunk of a table that names its pictures. Its row groups are large, and each chunk reads the names of its
group up to its own."""
PICTURE_COLUMNS = ("image", "picture", "img", "jpg", "jpeg", "png", "webp")
PATH_COLUMNS = ("path", "image_path", "file_path", "file_name", "filename", "image")


def listing(url: str, path_column: str = "", caption_column: str = "") -> tuple[list[dict], dict[str, int]]:
    """(chunks, {ending: files that were passed over}) of a folder, a file or a glob. ValueError where there is
    nothing."""
    fs, root, infos, lost = files_of(url)
    place = {"url": fs.unstrip_protocol(root)}
    by_ending: dict[str, list[str]] = {}
    for name in infos:
        by_ending.setdefault("tar" if name.lower().endswith(TAR) else ending_of(name), []).append(name)
    pictures = sorted(name for e in PICTURE for name in by_ending.get(e, ()))
    tars, tables = by_ending.get("tar", []), by_ending.get("parquet", [])
    chunks, used = [], set(captions.ENDINGS)
    if pictures:
        used |= PICTURE
        notes = [name for name in infos if posixpath.basename(name) in captions.METADATA]
        chunks += _picture_chunks(infos, place, pictures, _captions(fs, root, notes, lost))
        by_ending = {ending: [name for name in names if name not in notes] for ending, names in by_ending.items()}
    if tars:
        used.add("tar")
        chunks += [place | {"kind": "tar", "file": name, "stamp": stamp(infos[name])} for name in tars]
    if tables and not chunks:  # Tables beside pictures and tars are img2dataset's notes.
        used.add("parquet")
        for name in tables:
            try:
                chunks += _table_chunks(fs, root, place, name, stamp(infos[name]), path_column, caption_column)
            except (OSError, pa.ArrowException) as error:
                lost.append((name, "broken table", str(error)))
    if lost:
        chunks.append(place | {"kind": "lost", "items": lost})
    if not chunks:
        raise ValueError(f"{url} holds no pictures ({', '.join(sorted(PICTURE))}), no .tar and no .parquet file "
                         f"with rows; give the folder in which they are.")
    return chunks, {e: len(names) for e, names in sorted(by_ending.items()) if names and e not in used}


def files_of(url: str) -> tuple[fsspec.AbstractFileSystem, str, dict[str, dict], list[tuple[str, str, str]]]:
    """(file system, folder, {name in the folder: the store's information on the file}, [(name, reason, detail) of files
    that could not be opened]) of a folder, a file or a glob, by name. A place that exists is a path, whatever
    characters are in it. Hidden files and folders below it are left out; one that is named itself is not."""
    fs, root = locate(url)
    if fs.isfile(root):
        return fs, posixpath.dirname(root), {posixpath.basename(root): fs.info(root)}, []
    pattern = ""
    if not fs.isdir(root):
        while root and not fs.isdir(root) and root != (above := posixpath.dirname(root)):
            root, pattern = above, posixpath.join(posixpath.basename(root), pattern).rstrip("/")
        if not any(c in pattern for c in "*?["):
            raise ValueError(f"There is no {url}; give a folder, a file, or a glob of files.")
    deep = None if not pattern or "**" in pattern else pattern.count("/") + 1
    hidden = "/." in f"/{pattern}"
    infos, lost = _walk(root, deep, hidden) if isinstance(fs, LocalFileSystem) else (_find(fs, root, deep, hidden), [])
    if pattern:
        fits = re.compile(glob_translate(pattern)).match
        infos = {name: info for name, info in infos.items() if fits(name)}
    return fs, root, dict(sorted(infos.items())), lost


def _find(fs, root: str, deep: int | None, hidden: bool) -> dict[str, dict]:
    found = {posixpath.relpath(path, root): info for path, info in fs.find(root, maxdepth=deep, detail=True).items()}
    return {name: info for name, info in found.items()
            if info["type"] == "file" and (hidden or not any(part.startswith(".") for part in name.split("/")))}


def _walk(root: str, deep: int | None, hidden: bool) -> tuple[dict[str, dict], list[tuple[str, str, str]]]:
    """Files of this machine, with links followed. Each real folder is visited once, under its own name before that of a
    link."""
    infos: dict[str, dict] = {}
    lost, seen, folders, links = [], set(), deque([""]), deque()
    while folders or links:
        folder = (folders or links).popleft()
        path = os.path.join(root, folder)
        try:
            real = os.stat(path)
            if (real.st_dev, real.st_ino) in seen:
                continue
            seen.add((real.st_dev, real.st_ino))
            with os.scandir(path) as scan:
                entries = sorted((e for e in scan if hidden or not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            if not folder:
                raise
            lost.append((folder, "unreadable", f"{type(error).__name__}: {error}"))
            continue
        for entry in entries:
            name = posixpath.join(folder, entry.name)
            try:
                it = entry.stat()
            except OSError:  # The link is broken: reading it will report that.
                infos[name] = {"size": 0}
                continue
            if stat.S_ISREG(it.st_mode):
                infos[name] = {"size": it.st_size, "mtime": it.st_mtime}
            elif stat.S_ISDIR(it.st_mode) and (deep is None or name.count("/") + 1 < deep):
                (links if entry.is_symlink() else folders).append(name)
    return infos, lost


def stamp(info: dict) -> list:
    """Values that change when a file does, as far as its store tells. Its size in bytes comes first."""
    when = info.get("mtime") or info.get("ETag") or info.get("LastModified") or info.get("updated") or ""
    return [info["size"], str(when)]


def _captions(fs, root: str, notes: list[str], lost: list) -> dict[str, str]:
    """{picture: caption} of Hugging Face's image folders."""
    found = {}
    for name in notes:
        try:
            rows = captions.metadata(name, fs.cat_file(posixpath.join(root, name)))
        except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
            lost.append((name, "broken table", f"{type(error).__name__}: {error}"))
            continue
        folder = posixpath.dirname(name)
        found |= {posixpath.normpath(posixpath.join(folder, file)): text for file, text in rows.items()}
    return found


def _picture_chunks(infos: dict[str, dict], place: dict, pictures: list[str], noted: dict[str, str]) -> Iterator[dict]:
    """Chunks of items (picture, its caption file or None) and of a table's captions {picture: caption}."""
    beside = {}
    for name in infos:  # The order is by name, so that of a.TXT and a.txt the second counts.
        if ending_of(name) in captions.ENDINGS:
            beside[posixpath.splitext(name)[0], ending_of(name)] = name
    for i in range(0, len(pictures), ROWS):
        items = []
        for name in pictures[i:i + ROWS]:
            sides = (beside.get((posixpath.splitext(name)[0], ending)) for ending in captions.ENDINGS)
            items.append((name, next(filter(None, sides), None)))
        stamps = [stamp(infos[name]) for pair in items for name in pair if name]
        chunk = place | {"kind": "files", "items": items, "stamp": stamps}
        words = {name: noted[name] for name, side in items if side is None and name in noted}
        yield chunk | ({"captions": words} if words else {})


def _table_chunks(fs, root: str, place: dict, name: str, mark: list, path_column: str,
                  caption_column: str) -> list[dict]:
    """Chunks of a table: its row groups where it holds the pictures, runs of rows where it names them."""
    with fs.open(posixpath.join(root, name), "rb") as stream:
        file = pq.ParquetFile(stream)
        fields = {field.name: field.type for field in file.schema_arrow}
        holding = [n for n in PICTURE_COLUMNS if (found := _named(fields, n)) and _holds_pictures(fields[found])]
        column = _column(place["url"], name, fields, path_column, (*holding, *PATH_COLUMNS), "--path-column")
        caption = None
        if caption_column or any(_named(fields, n) for n in captions.COLUMNS):
            caption = _column(place["url"], name, fields, caption_column, captions.COLUMNS, "--caption-column")
        chunks = row_chunks(file, place, name, mark, {"": column}, {"caption": caption} if caption else {})
    if _holds_pictures(fields[column]):
        return chunks
    return [chunk | {"first": first, "rows": min(NAMED, chunk["rows"] - first)}
            for chunk in chunks for first in range(0, chunk["rows"], NAMED)]


def row_chunks(file: pq.ParquetFile, place: dict, name: str, mark: list, members: dict, texts: dict) -> list[dict]:
    """A chunk for every row group of a parquet file. members, texts: {ours: column}."""
    base = place | {"kind": "rows", "file": name, "stamp": mark, "members": members, "texts": texts}
    return [base | {"group": g, "rows": file.metadata.row_group(g).num_rows} for g in range(file.num_row_groups)]


def _holds_pictures(kind: pa.DataType) -> bool:
    """Whether a type is bytes, Hugging Face's struct of bytes and path, or a list of either."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _named(fields: dict, name: str) -> str | None:
    """The column of this name, in any case where there is no exact match."""
    return name if name in fields else next((field for field in fields if field.lower() == name), None)


def _column(url: str, name: str, fields: dict, asked: str, usual: tuple[str, ...], flag: str) -> str:
    found = next((field for n in usual if (field := _named(fields, n))), None)
    if asked:
        found = asked if asked in fields else None
    if found is None:
        wanted = asked or " or ".join(dict.fromkeys(usual))
        raise ValueError(f"{name} in {url} has no column {wanted}, only {', '.join(fields)}; name the right one "
                         f"with {flag}.")
    return found


def weigh(chunks: list[dict]) -> tuple[list[int], str]:
    """(the share of work of each chunk, its unit): samples where all can be counted, bytes where there are tars."""
    if any(chunk["kind"] == "tar" for chunk in chunks):
        return [_bytes_of(chunk) for chunk in chunks], "B"
    return [count_of(chunk) for chunk in chunks], " samples"


def count_of(chunk: dict) -> int:
    """How many samples a chunk has; 0 for a tar, whose number is known only after reading."""
    return chunk["rows"] if chunk["kind"] == "rows" else len(chunk.get("items", ()))


def _bytes_of(chunk: dict) -> int:
    if chunk["kind"] == "tar":
        return chunk["stamp"][0]
    return sum(size for size, _ in chunk["stamp"]) if chunk["kind"] == "files" else 0
