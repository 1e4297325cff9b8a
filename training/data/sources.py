"""Where samples come from: folders of pictures, tars as img2dataset writes them, parquet files of paths or of pictures.

A source is cut into chunks, small JSON records that any worker can read by itself. The order of the chunks and of the
samples in them is that of the sorted names, so it does not depend on who reads them.
"""
from __future__ import annotations

import json
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

PICTURE = {"jpg", "jpeg", "jfif", "png", "webp", "avif", "bmp", "gif", "tif", "tiff", "jp2"}
ROWS = 64
"""Pictures to a chunk, of loose files."""
PATH_COLUMNS = ("path", "image_path", "file_path", "file_name", "filename", "image")
CAPTION_COLUMNS = ("caption", "text", "prompt", "txt")


@dataclass
class Found:
    """One sample as it was found. data: {member: bytes}, "" the picture itself; trouble: (reason, detail) where a member
    could not even be read."""

    origin: str
    data: dict[str, bytes] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    trouble: tuple[str, str] | None = None


def listing(url: str, path_column: str = "", caption_column: str = "") -> tuple[list[dict], dict[str, int]]:
    """(chunks, {ending: files that were passed over}) of a folder, a file or a glob. Raises ValueError where there is nothing."""
    fs, root, infos = files_of(url)
    place = {"url": fs.unstrip_protocol(root)}
    by_ending: dict[str, list[str]] = {}
    for name in infos:
        by_ending.setdefault(ending_of(name), []).append(name)
    pictures = sorted(name for e in PICTURE for name in by_ending.get(e, ()))
    tars, tables = by_ending.get("tar", []), by_ending.get("parquet", [])

    chunks = []
    items = [(name, next((c for e in (".txt", ".json") if (c := posixpath.splitext(name)[0] + e) in infos), None))
             for name in pictures]
    for i in range(0, len(items), ROWS):
        part = items[i:i + ROWS]
        stamps = [stamp(infos[name]) for pair in part for name in pair if name]
        chunks.append(place | {"kind": "files", "items": part, "stamp": stamps})
    chunks += [place | {"kind": "tar", "file": name, "stamp": stamp(infos[name])} for name in tars]
    used = {"txt", "json"} | (PICTURE if pictures else set()) | ({"tar"} if tars else set())
    if tables and not chunks:  # Beside pictures and tars they are img2dataset's notes.
        used.add("parquet")
        for name in tables:
            chunks += _table_chunks(fs, root, place, name, stamp(infos[name]), path_column, caption_column)
    if not chunks:
        raise ValueError(f"{url} holds no pictures ({', '.join(sorted(PICTURE))}), no .tar and no .parquet file.")
    return chunks, dict(Counter({e: len(names) for e, names in by_ending.items() if e not in used}))


def files_of(url: str) -> tuple[fsspec.AbstractFileSystem, str, dict[str, dict]]:
    """(file system, folder, {name in the folder: what the store tells of the file}) of a folder, a file or a glob, by name;
    without hidden files."""
    fs, root = fsspec.url_to_fs(url)
    if any(c in root for c in "*?["):
        infos = fs.glob(root, detail=True)
        root = posixpath.dirname(re.split(r"[*?[]", root)[0])
    elif fs.isdir(root):
        infos = fs.find(root, detail=True)
    elif fs.isfile(root):
        infos, root = {root: fs.info(root)}, posixpath.dirname(root)
    else:
        raise ValueError(f"There is no {url}; give a folder, a file, or a glob of files.")
    infos = {posixpath.relpath(name, root): info for name, info in sorted(infos.items()) if info["type"] == "file"}
    return fs, root, {name: info for name, info in infos.items() if not any(part.startswith(".") for part in name.split("/"))}


def ending_of(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()


def stamp(info: dict) -> list:
    """What changes when a file does, as far as its store tells."""
    when = info.get("mtime") or info.get("ETag") or info.get("LastModified") or info.get("updated") or ""
    return [info["size"], str(when)]


def _table_chunks(fs, root: str, place: dict, name: str, mark: list, path_column: str, caption_column: str) -> list[dict]:
    with fs.open(posixpath.join(root, name), "rb") as stream:
        file = pq.ParquetFile(stream)
        names = file.schema_arrow.names
        column = _column(place["url"], name, names, path_column, PATH_COLUMNS, "--path-column")
        caption = _column(place["url"], name, names, caption_column, CAPTION_COLUMNS, "") if (
            caption_column or set(CAPTION_COLUMNS) & set(names)) else None
        if pa.types.is_struct(file.schema_arrow.field(column).type):
            members = {"": column}
            texts = {"caption": caption} if caption else {}
            return row_chunks(file, place, name, mark, members, texts)
        table = file.read(columns=[c for c in (column, caption) if c])
        texts = table.column(caption).to_pylist() if caption else [None] * len(table)
        rows = sorted(zip(table.column(column).to_pylist(), texts), key=lambda r: (r[0] or "", r[1] or ""))
        base = place | {"kind": "paths", "table": name, "stamp": mark}
        return [base | {"items": rows[i:i + ROWS]} for i in range(0, len(rows), ROWS)]


def row_chunks(file: pq.ParquetFile, place: dict, name: str, mark: list, members: dict, texts: dict) -> list[dict]:
    """A chunk for every row group of a parquet file that holds the pictures themselves. members, texts: {ours: column}."""
    return [place | {"kind": "rows", "file": name, "group": g, "rows": file.metadata.row_group(g).num_rows, "stamp": mark,
                     "members": members, "texts": texts} for g in range(file.num_row_groups)]


def _column(url: str, name: str, names: list[str], asked: str, usual: tuple[str, ...], flag: str) -> str:
    wanted = [asked] if asked else [c for c in usual if c in names]
    if not wanted or wanted[0] not in names:
        raise ValueError(f"{name} in {url} has no column {asked or ' or '.join(usual)}, only {', '.join(names)}; "
                         f"name the right one with {flag or '--caption-column'}.")
    return wanted[0]


def count_of(chunk: dict) -> int:
    """How many samples a chunk has; 0 where only reading it tells."""
    return len(chunk.get("items", ())) or chunk.get("rows", 0)


def about(chunk: dict) -> str:
    """The name of a chunk in an error."""
    if "items" in chunk:
        return f"the {len(chunk['items'])} files from {chunk['items'][0][0]} on"
    return chunk["file"] + (f", row group {chunk['group']}" if "group" in chunk else "")


def caption_of(text: bytes | None, record: bytes | None) -> str:
    """From a .txt file or the "caption" (or "text") of a .json file; empty where there is none that can be read."""
    if text is not None:
        return text.decode("utf-8", "replace").strip()
    try:
        data = json.loads(record or b"{}")
    except ValueError:
        return ""
    value = next((data[k] for k in CAPTION_COLUMNS if data.get(k)), "") if isinstance(data, dict) else ""
    return value.strip() if isinstance(value, str) else ""


def read(chunk: dict, wanted: set[int] | None = None) -> Iterator[Found]:
    """The samples of a chunk in its order. wanted: their places in it, from 0; the others are passed over unread."""
    fs, root = fsspec.url_to_fs(chunk["url"])
    yield from _READERS[chunk["kind"]](fs, root, chunk, wanted)


def _fetch(fs, path: str, found: Found, member: str = "") -> None:
    try:
        found.data[member] = fs.cat_file(path)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        found.trouble = "unreadable", f"{type(error).__name__}: {path}"


def _read_files(fs, root: str, chunk: dict, wanted: set[int] | None) -> Iterator[Found]:
    for place, (name, side) in enumerate(chunk["items"]):
        if wanted is not None and place not in wanted:
            continue
        found = Found(name)
        _fetch(fs, posixpath.join(root, name), found)
        words = fs.cat_file(posixpath.join(root, side)) if side else None
        text = ending_of(side) == "txt" if side else False
        found.texts["caption"] = caption_of(words if text else None, None if text else words)
        yield found


def _read_paths(fs, root: str, chunk: dict, wanted: set[int] | None) -> Iterator[Found]:
    for place, (name, words) in enumerate(chunk["items"]):
        if wanted is not None and place not in wanted:
            continue
        found = Found(name or f"{chunk['table']}, a row without a path", texts={"caption": (words or "").strip()})
        if not name:
            found.trouble = "unreadable", "no path"
        elif "://" in name:
            _fetch(*fsspec.url_to_fs(name), found)
        else:
            _fetch(fs, posixpath.join(root, posixpath.dirname(chunk["table"]), name), found)
        yield found


def _read_tar(fs, root: str, chunk: dict, wanted: set[int] | None) -> Iterator[Found]:
    with fs.open(posixpath.join(root, chunk["file"]), "rb") as stream:
        members, trouble = {}, None
        try:
            tar = tarfile.open(fileobj=stream, mode="r:")
            while (member := tar.next()) is not None:
                if member.isfile():
                    members[member.name] = member
        except tarfile.TarError as error:
            trouble = Found(chunk["file"], trouble=("broken tar", str(error)))

        def data(name: str) -> bytes | None:
            if name not in members:
                return None
            try:
                return tar.extractfile(members[name]).read()
            except tarfile.TarError:
                return b""

        for place, name in enumerate(name for name in members if ending_of(name) in PICTURE):
            if wanted is None or place in wanted:
                words = [data(f"{posixpath.splitext(name)[0]}.{ending}") for ending in ("txt", "json")]
                yield Found(f"{chunk['file']}/{name}", {"": data(name)}, {"caption": caption_of(*words)})
        if trouble and wanted is None:
            yield trouble


def _read_rows(fs, root: str, chunk: dict, wanted: set[int] | None) -> Iterator[Found]:
    folder = posixpath.dirname(posixpath.join(root, chunk["file"]))
    with fs.open(posixpath.join(root, chunk["file"]), "rb") as stream:
        file, place = pq.ParquetFile(stream), -1
        columns = [*chunk["members"].values(), *chunk["texts"].values()]
        for batch in file.iter_batches(batch_size=16, row_groups=[chunk["group"]], columns=columns):
            for row in range(batch.num_rows):
                place += 1
                if wanted is not None and place not in wanted:
                    continue
                found = Found(f"{chunk['file']}, row {place} of group {chunk['group']}")
                for member, column in chunk["members"].items():
                    value = batch.column(column)[row].as_py() or {}
                    if not isinstance(value, dict):
                        value = {"bytes" if isinstance(value, bytes) else "path": value}
                    if value.get("bytes") is not None:
                        found.data[member] = value["bytes"]
                    elif value.get("path"):
                        _fetch(fs, posixpath.join(folder, value["path"]), found, member)
                    elif member != "mask":
                        found.trouble = "unreadable", f"column {column} is empty"
                for ours, column in chunk["texts"].items():
                    found.texts[ours] = (batch.column(column)[row].as_py() or "").strip()
                yield found


_READERS = {"files": _read_files, "paths": _read_paths, "tar": _read_tar, "rows": _read_rows}
