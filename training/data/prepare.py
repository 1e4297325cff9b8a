"""`sda prepare`: from pictures in a folder, tars or parquet files to tar shards, their index and a report."""
from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from .choice import Choice, choose
from .files import absolute, digest, listed, locate, read_table, sweep, whole_file, write_json
from .index import NAME, PICTURES, Index, schema
from .pictures import VERSION
from .pipeline import Workers, stoppable, stream, workers
from .readers import UNREACHABLE, about
from .shards import mark_of, scan, write
from .sources import listing, weigh

TOGETHER = 64
"""Number of shards whose rows become one row group of the index."""


@dataclass(frozen=True)
class Config:
    source: str
    """A folder (pictures at any depth, captions beside them as .txt, .caption or .json), .tar files as img2dataset
    writes them, or .parquet files with a column of paths or of pictures. A glob works too. So does an object store
    (s3://, ...)."""
    out: str
    """Folder of the shards and the index, local or of an object store."""
    resolutions: tuple[int, ...] = (512, 768, 1024)
    """In pixels. Pictures whose shorter side is below the smallest are dropped."""
    shard_mb: int = 256
    path_column: str = ""
    """Column of parquet files. Empty: found by its name."""
    caption_column: str = ""
    workers: int = 0
    """Number of processes on this machine. 0: one for each core."""
    ray: bool = False
    """Start Ray, or use the one to which the process is connected."""
    ray_address: str = ""
    """Address of a running Ray cluster, `auto` or `host:6379`. Every node must have this pack and see source and
    out."""


def run(config: Config) -> bool:
    chunks, passed = listing(absolute(config.source), config.path_column, config.caption_column)
    return prepare(config, chunks, passed, PICTURES)


def prepare(config: Config, chunks: list[dict], passed: dict[str, int], kind: str) -> bool:
    """Examine the chunks, choose, write the shards, then the report and the index. False where a signal stopped it."""
    if config.shard_mb < 1 or not config.resolutions:
        raise ValueError("A shard needs at least 1 MB and a set at least one resolution; change --shard-mb or "
                         "--resolutions.")
    out, least = absolute(config.out), min(config.resolutions)
    fs, root = locate(out)
    try:
        with stoppable(), workers(config.workers, config.ray, config.ray_address) as made:
            marks = examine_all(made, out, chunks, least)
            choice = choose(fs, marks)
            if not len(choice.kept):
                report(fs, root, config, choice, passed, {})
                raise ValueError(f"Of {choice.count} samples none is left ({counted(choice.reasons)}); see "
                                 f"{out}/report.json.")
            tasks = layout(choice, chunks, marks, out, kind, config)
            finish(made, out, tasks)
            write_index(fs, root, len(tasks), kind, config, partial(report, fs, root, config, choice, passed))
    except KeyboardInterrupt:
        print("Stopped. The same line goes on from here.")
        return False
    dropped = sum(choice.reasons.values())
    print(f"{len(choice.kept)} samples in {len(tasks)} shards, {dropped} dropped{counted(choice.reasons, ': ')}. "
          f"{out}/report.json says why.")
    return True


def examine_all(made: Workers, out: str, chunks: list[dict], least: int) -> list[str]:
    """The marks (paths of tables of SCANNED) of all chunks in their order. Examined chunks are not read again, except
    those in which something did not answer."""
    fs, root = locate(f"{out}/_work/scan")
    sizes, unit = weigh(chunks)
    tasks = [scan_task(out, chunk, least) | {"size": size} for chunk, size in zip(chunks, sizes)]
    names, there = [posixpath.basename(task["mark"]) for task in tasks], listed(fs, root)

    def done(name: str) -> bool:
        if name not in there:
            return False
        return UNREACHABLE not in read_table(fs, posixpath.join(root, name), ["reason"])["reason"].to_pylist()

    with ThreadPoolExecutor(16) as pool:
        todo = {name: task for name, task, is_done in zip(names, tasks, pool.map(done, names)) if not is_done}
    stream(made, scan, list(todo.values()), "examining", unit)
    sweep(fs, root)
    return [posixpath.join(root, name) for name in names]


def scan_task(out: str, chunk: dict, least: int) -> dict:
    """The task of `scan`. The name of its mark depends on everything that its rows depend on."""
    name = f"{digest(VERSION, least, chunk)}.parquet"
    return {"chunk": json.dumps(chunk), "mark": f"{out}/_work/scan/{name}", "least": least, "about": about(chunk)}


def layout(choice: Choice, chunks: list[dict], marks: list[str], out: str, kind: str, config: Config) -> list[dict]:
    """The tasks of `write`: the kept samples in order, cut into shards of about shard_mb."""
    tasks = []
    for number, (first, end) in enumerate(choice.shards(config.shard_mb * 2 ** 20)):
        parts = [[json.dumps(chunks[n]), f"{out}/_work/scan/{posixpath.basename(marks[n])}", runs]
                 for n, runs in choice.runs(first, end)]
        tasks.append({"out": out, "number": number, "kind": kind, "resolutions": list(config.resolutions),
                      "first": first,
                      "parts": parts, "captions": choice.borrowed(first, end), "size": end - first,
                      "about": f"shard {number}"})
    return tasks


def finish(made: Workers, out: str, tasks: list[dict]) -> None:
    """Write the missing shards, and remove those of an earlier, longer set."""
    fs, root = locate(out)
    names = {f"{task['number']:06}" for task in tasks}
    stale = [posixpath.join(root, folder, name) for folder in ("_work/shards", "shards")
             for name in listed(fs, posixpath.join(root, folder)) if name.split(".")[0] not in names]
    if stale and fs.exists(posixpath.join(root, NAME)):
        fs.rm_file(posixpath.join(root, NAME))
    for path in stale:
        fs.rm_file(path)
    stream(made, write, tasks, "writing")
    for folder in ("shards", "_work/shards"):
        sweep(fs, posixpath.join(root, folder))


def write_index(fs, root: str, shards: int, kind: str, config: Config, before: Callable[[dict], None]) -> None:
    """Write one table of all shards' rows, a few shards at a time. before: called with the samples in each bucket when
    everything is written and the index is not yet visible: the index says that the set is complete."""
    wanted, buckets = schema(kind, config.resolutions), {r: Counter() for r in config.resolutions}
    with (whole_file(fs, posixpath.join(root, NAME)) as stream, ThreadPoolExecutor(16) as pool,
          pq.ParquetWriter(stream, wanted, compression="zstd") as writer):
        for start in range(0, shards, TOGETHER):
            paths = [posixpath.join(root, mark_of(number)) for number in range(start, min(start + TOGETHER, shards))]
            parts = pool.map(partial(read_table, fs), paths)
            table = pa.concat_tables([part.replace_schema_metadata(None) for part in parts]).cast(wanted)
            writer.write_table(table)
            for r in config.resolutions:
                buckets[r].update(map(tuple, Index(config.out, table).buckets(r).tolist()))
        before(buckets)


def counted(reasons: dict[str, int], lead: str = "") -> str:
    return lead + ", ".join(f"{n} {reason}" for reason, n in reasons.items()) if reasons else ""


def report(fs, root: str, config: Config, choice: Choice, passed: dict[str, int], buckets: dict[int, Counter]) -> None:
    """Write report.json (numbers) and report.parquet (every dropped sample, with reason and detail)."""
    choice.write_dropped(fs, posixpath.join(root, "report.parquet"))
    counts = {r: {"smaller": sizes.pop((0, 0), 0)} | {f"{h}x{w}": n for (h, w), n in sorted(sizes.items())}
              for r, sizes in buckets.items()}
    write_json(fs, posixpath.join(root, "report.json"), {
        "source": config.source, "kept": len(choice.kept), "dropped": choice.reasons, "with_caption": choice.captioned,
        "captions_unreadable": choice.silent, "files_passed_over": passed, "bytes": choice.bytes,
        "buckets_height_x_width": counts,
    })
