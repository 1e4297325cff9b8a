"""Pictures per second that one core prepares and decodes, beside a bare loop that decodes, resizes and encodes.

    python3 run.py bench data [--pictures 16] [--rounds 7] [--json]

The pictures have the spectrum of photographs and are JPEGs of several sizes. They go through `sda prepare`'s two steps
(every picture is read and examined; then read again, hashed and written into a shard) and through the training's loader
(a ranged read of the shard, its hash, decoding, a crop and a resize to a 1024 px bucket, a tensor). The bare loop is
Pillow alone, as in other preparers: open, fit to the same bucket, save as JPEG. All three take turns on the same core.
Only that core's time counts, so that other work on the machine hardly changes it. A run of the default settings
replaces benchmarks/data.md.
"""
from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ..training.data import prepare, shards
from ..training.data.choice import choose
from ..training.data.decode import decode
from ..training.data.files import locate
from ..training.data.index import Index, bucket_of
from ..training.data.sources import listing
from ..training.miniature.evaluation import table

PAGE = Path(__file__).with_suffix(".md")
SIZES = ((1024, 1024), (1536, 1024), (1600, 1200), (2048, 1536), (4000, 3000))
"""(width, height)"""
RESOLUTION, QUALITY = 1024, 90
PICTURES, ROUNDS = 16, 7


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG of noise whose amplitude falls with the frequency, as that of photographs does."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = (np.fft.rfft2(draw.standard_normal((height, width))) for _ in range(3))
    grey, *colours = (np.fft.irfft2(part / frequency ** 1.2, (height, width)) for part in noise)
    pixels = np.stack([grey, grey + 0.3 * colours[0], grey + 0.3 * colours[1]], -1)
    stream = io.BytesIO()
    image = Image.fromarray((128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8))
    image.save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def bare(data: bytes, bucket: tuple[int, int]) -> None:
    image = ImageOps.fit(Image.open(io.BytesIO(data)).convert("RGB"), bucket[::-1], Image.Resampling.LANCZOS)
    image.save(io.BytesIO(), "JPEG", quality=QUALITY)


def measure(width: int, height: int, pictures: int, rounds: int, folder: Path) -> dict:
    """Pictures per second of one core's time, as medians of the rounds."""
    source, out = folder / "in", folder / "set"
    source.mkdir()
    files = [photograph(width, height, seed) for seed in range(pictures)]
    for number, data in enumerate(files):
        (source / f"{number:03}.jpg").write_bytes(data)
    bucket = bucket_of(height, width, RESOLUTION)
    config = prepare.Config(str(source), str(out), (RESOLUTION,))
    chunks, _ = listing(str(source))
    scans = [prepare.scan_task(str(out), chunk, RESOLUTION) for chunk in chunks]
    fs, root = locate(str(out))

    def prepared() -> int:
        """The shards."""
        for scan in scans:
            shards.scan(scan)
        marks = [scan["mark"] for scan in scans]
        for mark in (out / "_work" / "shards").glob("*"):
            mark.unlink()
        tasks = prepare.layout(choose(fs, marks), chunks, marks, str(out), "pictures", config)
        for task in tasks:
            shards.write(task)
        return len(tasks)

    prepare.write_index(fs, root, prepared(), "pictures", config, lambda buckets: None)
    index = Index.read(str(out))

    def loaded() -> None:
        for row in range(len(index)):
            decode(index, row, bucket)

    work: dict[str, Callable[[], object]] = {
        "bare": lambda: [bare(data, bucket) for data in files], "prepare": prepared, "loader": loaded}
    taken = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, run in work.items():
            start = time.process_time()
            run()
            taken[name].append(time.process_time() - start)
    speed = {name: pictures / statistics.median(seconds[1:]) for name, seconds in taken.items()}
    kilobytes = sum(map(len, files)) / pictures / 1000
    return {"width": width, "height": height, "bucket": bucket, "kilobytes": kilobytes, **speed}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench data", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results, lines = [], []
    for width, height in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            it = measure(width, height, options.pictures, options.rounds, Path(folder))
        results.append(it)
        lines.append([f"{width} x {height}", f"{it['kilobytes']:.0f}", f"{it['bucket'][1]} x {it['bucket'][0]}",
                      *(f"{it[name]:.0f}" for name in ("bare", "prepare", "loader")),
                      *(f"{it[name] / it['bare']:.1f}" for name in ("prepare", "loader"))])
        print(*lines[-1], sep="  ", file=sys.stderr, flush=True)
    page = "\n".join([
        "# Pictures a second of one core",
        "",
        f"{table.machine()}; {date.today()}; "
        f"`python3 run.py bench data --pictures {options.pictures} --rounds {options.rounds}`",
        "",
        "*bare*: Pillow alone: decode, fit to the bucket (Lanczos), encode as JPEG. *prepare*: both passes of `sda "
        "prepare` over the same files. *loader*: what training does with a prepared picture: ranged read, hash, "
        "decode, crop and resize to the bucket, float tensor. Per second of one core's time, all in one process, "
        "turn by turn.",
        "",
        *table.rows(["JPEG, px", "KB", "bucket, px", "bare", "prepare", "loader", "prepare / bare", "loader / bare"],
                    lines),
        "",
    ])
    print(page)
    if (options.pictures, options.rounds) == (PICTURES, ROUNDS):
        PAGE.write_text(page, encoding="utf-8")
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
