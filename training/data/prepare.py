"""`sda prepare`: pictures from a folder, img2dataset's tars or a parquet file to tar shards, their index and a report."""
from __future__ import annotations

import json
import posixpath
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .files import absolute, digest, listed, read_table, sweep, write_json, write_table
from .index import NAME, PICTURES, Index, schema
from .pictures import VERSION
from .pipeline import cluster, stoppable, stream
from .shards import MEMBERS, SCANNED, mark_of, scan, write
from .sources import about, count_of, listing


@dataclass(frozen=True)
class Config:
    source: str
    """A folder (pictures at any depth, captions beside them as .txt or .json), .tar files as img2dataset writes them, or
    .parquet files with a column of paths or of pictures; also a glob, also of an object store (s3://, gs://, ...)."""
    out: str
    """Folder of the shards and the index, local or of an object store."""
    resolutions: tuple[int, ...] = (512, 768, 1024)
    """In pixels. Pictures whose shorter side is below the least are dropped."""
    shard_mb: int = 256
    path_column: str = ""
    """Of parquet files; found by its name where empty."""
    caption_column: str = ""
    workers: int = 0
    """Processes on this machine; 0: one for each core."""
    ray_address: str = ""
    """A running Ray cluster, as in `auto` or `host:6379`; every node must have this pack and see source and out."""


def run(config: Config) -> bool:
    chunks, passed = listing(absolute(config.source), config.path_column, config.caption_column)
    return prepare(config, chunks, passed, PICTURES)


def prepare(config: Config, chunks: list[dict], passed: dict[str, int], kind: str) -> bool:
    """Examine the chunks, choose, write the shards, then the report and the index. False where a signal stopped it."""
    if config.shard_mb < 1 or not config.resolutions:
        raise ValueError("A shard needs at least 1 MB and a set at least one resolution; change --shard-mb or --resolutions.")
    out, least = absolute(config.out), min(config.resolutions)
    fs, root = fsspec.url_to_fs(out)
    try:
        with cluster(config.ray_address, config.workers), stoppable():
            scanned = examine_all(fs, out, root, chunks, least)
            kept, dropped = choose(scanned)
            if not len(kept):
                report(fs, root, config, kept, dropped, passed, [])
                raise ValueError(f"Of {len(dropped)} samples none is left ({counted(dropped)}); see {out}/report.json.")
            tasks = layout(kept, chunks, out, kind, config)
            finish(fs, root, out, tasks, len(kept))
            index = merge(fs, root, tasks, kind, config.resolutions)
    except KeyboardInterrupt:
        print("Stopped. The same line goes on from here.")
        return False
    report(fs, root, config, kept, dropped, passed, index)
    write_table(fs, posixpath.join(root, NAME), index)  # Last: it says that everything is there.
    print(f"{len(kept)} samples in {len(tasks)} shards, {len(dropped)} dropped{counted(dropped, ': ')}. {out}/report.json says why.")
    return True


def examine_all(fs, out: str, root: str, chunks: list[dict], least: int) -> pa.Table:
    """SCANNED of all chunks in their order, with the number of the chunk and the place in it. What was examined before is not
    read again."""
    marks = [scan_task(out, chunk, least) for chunk in chunks]
    names = [posixpath.basename(task["mark"]) for task in marks]
    there = listed(fs, posixpath.join(root, "_work/scan"))
    tasks = {name: task for name, task in zip(names, marks) if name not in there}
    counts = [count_of(chunk) for name, chunk in zip(names, chunks) if name in tasks]
    stream(scan, list(tasks.values()), "examining", sum(counts) if all(counts) else 0,
           f"{out}/_work/notes")
    sweep(fs, posixpath.join(root, "_work/scan"))
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(lambda name: read_table(fs, posixpath.join(root, "_work/scan", name)), names))
    chunk = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
    place = np.concatenate([np.arange(len(p)) for p in parts])
    table = pa.concat_tables(parts).append_column("chunk", pa.array(chunk, pa.int64()))
    return table.append_column("place", pa.array(place, pa.int64())).combine_chunks()


def scan_task(out: str, chunk: dict, least: int) -> dict:
    """The task of `scan`; its mark is named after all that its rows depend on."""
    name = f"{digest(VERSION, least, chunk)}.parquet"
    return {"chunk": json.dumps(chunk), "mark": f"{out}/_work/scan/{name}", "least": least, "about": about(chunk)}


def choose(scanned: pa.Table) -> tuple[pa.Table, pa.Table]:
    """(kept, dropped): of samples of equal content the first of the source's order is kept, with the first caption
    that any of them has."""
    reasons, details = scanned.column("reason").to_pylist(), scanned.column("detail").to_pylist()
    captions, first = scanned.column("caption").to_pylist(), {}
    for row, (same, reason) in enumerate(zip(scanned.column("same").to_pylist(), reasons)):
        if not reason and (kept := first.setdefault(same, row)) != row:
            reasons[row], details[row] = "duplicate", f"the same as {scanned.column('origin')[kept].as_py()}"
            captions[kept] = captions[kept] or captions[row]
    good = np.array([not reason for reason in reasons], bool)
    dropped = pa.table({"origin": scanned.column("origin"), "reason": pa.array(reasons, pa.string()),
                        "detail": pa.array(details, pa.large_string())})
    place = scanned.column_names.index("caption")
    scanned = scanned.set_column(place, "caption", pa.array(captions, pa.large_string()))
    return scanned.filter(pa.array(good)), dropped.filter(pa.array(~good))


def layout(kept: pa.Table, chunks: list[dict], out: str, kind: str, config: Config) -> list[dict]:
    """The tasks of `write`: the kept samples in order, cut into shards of about shard_mb."""
    size = sum(kept.column(f"{m}_length").fill_null(0).to_numpy() for m in MEMBERS)
    shard = (np.cumsum(size) - size) // (config.shard_mb * 2 ** 20)
    starts = np.flatnonzero(np.diff(shard, prepend=-1))
    tasks = []
    for number, (first, end) in enumerate(zip(starts.tolist(), [*starts[1:].tolist(), len(kept)])):
        part = kept.slice(first, end - first)
        numbers, firsts = np.unique(part.column("chunk").to_numpy(), return_index=True)
        places = np.split(part.column("place").to_numpy(), firsts[1:])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, SCANNED) as writer:
            writer.write_table(part.select(SCANNED.names))
        rows = [{k: v.hex() if isinstance(v, bytes) else v for k, v in row.items()} for row in part.select(SCANNED.names).to_pylist()]
        tasks.append({
            "out": out, "number": number, "kind": kind, "resolutions": list(config.resolutions), "first": first,
            "parts": json.dumps([[chunks[n], p.tolist()] for n, p in zip(numbers.tolist(), places)]),
            "samples": sink.getvalue().to_pybytes(), "count": len(part), "about": f"shard {number}",
            "inputs": digest(kind, list(config.resolutions), first, rows)})
    return tasks


def finish(fs, root: str, out: str, tasks: list[dict], total: int) -> None:
    """Write the shards that are not there yet, and take away those of an earlier, longer set."""
    shards, marks = listed(fs, posixpath.join(root, "shards")), listed(fs, posixpath.join(root, "_work/shards"))

    def done(task: dict) -> bool:
        mark, shard = posixpath.basename(mark_of(task["number"])), f"{task['number']:06}.tar"
        if mark not in marks or shard not in shards:
            return False
        with fs.open(posixpath.join(root, mark_of(task["number"])), "rb") as file:
            record = pq.read_schema(file).metadata
        return record[b"inputs"].decode() == task["inputs"] and int(record[b"size"]) == shards[shard]

    with ThreadPoolExecutor(16) as pool:
        ready = list(pool.map(done, tasks))
    todo = [{k: v for k, v in task.items() if k != "count"} for task, is_done in zip(tasks, ready) if not is_done]
    names = {f"{task['number']:06}" for task in tasks}
    stale = [posixpath.join(root, folder, name) for folder, there in (("_work/shards", marks), ("shards", shards))
             for name in there if name.split(".")[0] not in names]
    if (todo or stale) and fs.exists(posixpath.join(root, NAME)):
        fs.rm(posixpath.join(root, NAME))
    for path in stale:
        fs.rm(path)
    stream(write, todo, "writing", total - sum(t["count"] for t, is_done in zip(tasks, ready) if is_done),
           f"{out}/_work/notes")
    for folder in ("shards", "_work/shards"):
        sweep(fs, posixpath.join(root, folder))


def merge(fs, root: str, tasks: list[dict], kind: str, resolutions: tuple[int, ...]) -> pa.Table:
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(lambda task: read_table(fs, posixpath.join(root, mark_of(task["number"]))), tasks))
    wanted = schema(kind, resolutions)
    return pa.concat_tables([p.replace_schema_metadata(None) for p in parts]).cast(wanted)


def counted(dropped: pa.Table, lead: str = "") -> str:
    reasons = Counter(dropped.column("reason").to_pylist()).most_common()
    return lead + ", ".join(f"{n} {reason}" for reason, n in reasons) if reasons else ""


def report(fs, root: str, config: Config, kept: pa.Table, dropped: pa.Table, passed: dict[str, int], index) -> None:
    """report.json (numbers) and report.parquet (every dropped sample, with reason and detail)."""
    buckets = {}
    if len(index):
        table = Index(config.out, index)
        for r in config.resolutions:
            sizes = Counter(map(tuple, table.buckets(r).tolist()))
            buckets[r] = {"smaller": sizes.pop((0, 0), 0)} | {f"{h}x{w}": n for (h, w), n in sorted(sizes.items())}
    captions = sum(bool(text) for text in kept.column("caption").to_pylist())
    write_table(fs, posixpath.join(root, "report.parquet"), dropped)
    write_json(fs, posixpath.join(root, "report.json"), {
        "source": config.source, "kept": len(kept), "dropped": dict(Counter(dropped.column("reason").to_pylist()).most_common()),
        "with_caption": captions, "files_passed_over": passed,
        "bytes": int(sum(kept.column(f"{m}_length").fill_null(0).to_numpy().sum() for m in MEMBERS)),
        "buckets_height_x_width": buckets,
    })
