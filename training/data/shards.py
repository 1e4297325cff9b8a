"""The two steps of every preparation: examine the samples of a chunk, and write the chosen ones as a tar shard.

Each step reads its input by itself and leaves one small parquet file as its mark. So it can run on any worker, twice,
or not at all where its mark exists.
"""
from __future__ import annotations

import hashlib
import io
import json
import posixpath
import tarfile
from contextlib import suppress

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from .files import digest, locate, read_table, whole_file, write_table
from .index import EDITS, NAME, bucket_of, schema
from .pictures import BadPicture, picture_size
from .readers import Found, read

MEMBERS = ("", "target", "mask")
SCANNED = pa.schema([
    ("origin", pa.large_string()), ("reason", pa.string()), ("detail", pa.large_string()), ("same", pa.binary(32)),
    ("width", pa.int32()), ("height", pa.int32()),
    *((f"{m}_{what}", kind) for m in MEMBERS
      for what, kind in (("length", pa.int64()), ("sha256", pa.binary(32)), ("ending", pa.string()))),
    *((text, pa.large_string()) for text in ("caption", "source_caption", "target_caption")),
])
"""One row per sample. reason is "" where it is kept; detail then says why its caption could not be read. `same` is
equal for samples of equal content."""


def examine(found: Found, least: int) -> dict:
    """The row of SCANNED of one sample. least: pixels that its shorter side must have."""
    row = dict.fromkeys(SCANNED.names) | {"origin": found.origin, "reason": "", "detail": found.silent} | found.texts
    sizes, alike = [], hashlib.sha256()
    try:
        if found.trouble:
            raise BadPicture(*found.trouble)
        for member, data in found.data.items():
            try:
                size, ending = picture_size(data)
            except BadPicture as error:
                raise BadPicture(error.reason, f"{member}: {error}" if member else str(error)) from None
            sha = hashlib.sha256(data).digest()
            alike.update(sha)
            row |= {f"{member}_length": len(data), f"{member}_sha256": sha, f"{member}_ending": ending}
            sizes += [size] if member != "mask" else []
        width, height = (min(sides) for sides in zip(*sizes))
        if min(width, height) < least:
            raise BadPicture("small", f"{width} x {height}, shorter side below {least}")
        if any(abs(w * height / (h * width) - 1) > 0.02 for w, h in sizes):
            raise BadPicture("unlike shapes", " and ".join(f"{w} x {h}" for w, h in sizes))
        if len(sizes) > 1:  # One pair with two instructions is two samples.
            if not row["caption"]:
                raise BadPicture("no instruction", "the instruction is empty")
            alike.update(row["caption"].encode())
        return row | {"width": width, "height": height, "same": alike.digest()}
    except BadPicture as error:
        return row | {"reason": error.reason, "detail": str(error)}


def scan(task: dict) -> dict:
    """Examine every sample of a chunk. task: {"chunk", "mark": URL of the parquet file to leave, "least"}."""
    rows = [examine(found, task["least"]) for found in read(json.loads(task["chunk"]))]
    write_table(*locate(task["mark"]), pa.Table.from_pylist(rows, SCANNED))
    return {"samples": len(rows)}


def write(task: dict) -> dict:
    """Write one shard and then the rows of its index, unless both exist and are whole.

    task: {"out", "number", "kind", "resolutions", "first": number of its first sample in the set, "parts": [[chunk, URL
    of its mark, runs [first, end) of the samples' places in it], ...], "captions": {place in the shard: caption of
    another sample of the same content}}.
    """
    fs, root = locate(task["out"])
    name, mark = f"shards/{task['number']:06}.tar", posixpath.join(root, mark_of(task["number"]))
    samples, places = [], []
    for _, scanned, runs in task["parts"]:
        rows = read_table(*locate(scanned))
        places.append({place for first, end in runs for place in range(first, end)})
        samples += [row for first, end in runs for row in rows.slice(first, end - first).to_pylist()]
    for place, caption in task["captions"].items():
        samples[int(place)]["caption"] = caption
    inputs = digest(task["kind"], task["resolutions"], task["first"],
                    [{k: v.hex() if isinstance(v, bytes) else v for k, v in row.items()} for row in samples])
    if _whole(fs, mark, posixpath.join(root, name), inputs):
        return {"samples": len(samples)}
    for vouching in (posixpath.join(root, NAME), mark):  # both vouch for the file that is about to be replaced
        with suppress(FileNotFoundError):
            fs.rm_file(vouching)
    rows, expected = [], iter(samples)
    with whole_file(fs, posixpath.join(root, name)) as stream, tarfile.open(
            fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for (chunk, *_), wanted in zip(task["parts"], places):
            for found in read(json.loads(chunk), wanted):
                rows.append(_add(tar, task["first"] + len(rows), found, next(expected), task) | {"shard": name})
    if len(rows) != len(samples):
        raise changed(next(expected)["origin"])
    table = pa.Table.from_pylist(rows, schema(task["kind"], task["resolutions"]))
    kept = {"inputs": inputs, "size": str(fs.info(posixpath.join(root, name))["size"])}
    write_table(fs, mark, table.replace_schema_metadata(table.schema.metadata
                                                        | {k.encode(): v.encode() for k, v in kept.items()}))
    return {"samples": len(rows)}


def _whole(fs: fsspec.AbstractFileSystem, mark: str, shard: str, inputs: str) -> bool:
    """Whether the shard exists as its mark says and was made from these inputs."""
    try:
        with fs.open(mark, "rb") as file:
            record = pq.read_schema(file).metadata
        return record[b"inputs"].decode() == inputs and int(record[b"size"]) == fs.info(shard)["size"]
    except FileNotFoundError:
        return False


def mark_of(number: int) -> str:
    return f"_work/shards/{number:06}.parquet"


def changed(origin: str) -> ValueError:
    return ValueError(f"{origin} has changed while it was being prepared; leave the source alone and start the same "
                      "line again.")


def _add(tar: tarfile.TarFile, number: int, found: Found, sample: dict, task: dict) -> dict:
    """Append one sample. Returns its row of the index."""
    key, edit = f"{number:09}", task["kind"] == EDITS
    row = {name: sample.get(name) for name in ("origin", "width", "height", "caption")} | {"key": key}
    if edit:
        row |= {"mask_offset": 0, "mask_length": 0, "source_caption": sample["source_caption"] or "",
                "target_caption": sample["target_caption"] or ""}
    if found.trouble:
        raise ValueError(f"{sample['origin']} could be read before and cannot now ({found.trouble[1]}); start the "
                         f"same line again.")
    for member, data in found.data.items():
        if found.origin != sample["origin"] or hashlib.sha256(data).digest() != sample[f"{member}_sha256"]:
            raise changed(sample["origin"])
        ending = f"{member or 'source'}.{sample[f'{member}_ending']}" if edit else sample["_ending"]
        prefix = f"{member}_" if member else ""
        row |= {f"{prefix}offset": append(tar, f"{key}.{ending}", data), f"{prefix}length": len(data)}
        if member != "mask":
            row[f"{prefix}sha256"] = sample[f"{member}_sha256"]
    if sample["caption"]:
        append(tar, f"{key}.txt", sample["caption"].encode())
    return row | {f"bucket_{r}": bucket_of(row["height"], row["width"], r) for r in task["resolutions"]}


def append(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a member whose header has nothing but name and size, so that equal samples make equal bytes. Returns the
    offset of its data."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    start = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return start
