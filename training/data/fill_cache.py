"""`sda cache`: the frozen encoders' outputs for a prepared set, computed once, on the GPUs where there are any.

A task is ranges of entry numbers. Every worker reads the index and numbers the entries itself, as this process does.
"""
from __future__ import annotations

import posixpath
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from ...kernels.precision import frozen_dtype
from .choice import Runs, ranges
from .decode import decode, send
from .files import absolute, digest, listed, locate, read_table, sweep, whole_file, write_table
from .index import EDITS, NAME, Index
from .pipeline import Workers, stoppable, stream, workers
from .prefetch import Prefetch
from .read_cache import ENTRIES, Part, keys_of

SHARD = 128
"""Samples per shard, all of one bucket."""
Encode = Callable[[Tensor], dict[str, Tensor]]
"""images [B, 3, H, W] float32 in [0, 1] -> {name: [B, ...]}"""


@dataclass(frozen=True)
class Config:
    data: str
    """The folder that `sda prepare` or `sda prepare-edits` filled."""
    out: str
    """Folder of the caches. Several encoders and sets may share it."""
    vae: Path | None = None
    """Flux's VAE: ae.safetensors or a diffusers folder. Mean and deviation of its latents are kept, in float16."""
    towers: tuple[Path, ...] = field(default=())
    """Vision towers: safetensors files or folders. Their features are kept, in float16."""
    tower_ids: tuple[str, ...] = ()
    """For each file the id of a published encoder, "" where the file's record has it. Left out where every file has
    it."""
    unlock_blocks: int = 0
    """Number of DINOv2's last blocks that the training will unlock (objective.unlock_blocks). The hidden state before
    them is kept."""
    resolutions: tuple[int, ...] = ()
    """In pixels. Empty: all resolutions of the prepared set."""
    batch: int = 8
    workers: int = 0
    """Number of processes where there is no GPU. 0: one for each core. With GPUs: one for each of them."""
    ray: bool = False
    """Start Ray, or use the one to which the process is connected."""
    ray_address: str = ""
    """Address of a running Ray cluster. Every node must have this pack and see data, out and the encoders."""


def parts_of(config: Config) -> list[tuple[Part, dict]]:
    """(what is cached, how a worker loads its encoder), the VAE first."""
    from ..frozen.base import base_sha256
    from ..frozen.encoders import tower_config, with_ids

    for path in (*([config.vae] if config.vae else []), *config.towers):
        if not Path(path).exists():
            raise ValueError(f"There is no {path}; give the encoders' files with --vae and --towers.")
    found = []
    if config.vae:
        found.append((Part("vae", base_sha256(config.vae, "vae")), {"file": str(config.vae.resolve()), "tower": None}))
    for path, name in with_ids(config.towers, config.tower_ids):
        tower = tower_config(path, name)
        before = config.unlock_blocks if tower.kind == "dinov2" else 0
        found.append((Part(tower.id, base_sha256(path), before), {"file": str(path.resolve()), "tower": name}))
    if not found:
        raise ValueError("There is no encoder to cache; give --vae, --towers, or both.")
    return found


def load_encoder(part: Part, file: str, tower: str | None, device: torch.device) -> Encode:
    """The encoder of a part, in the dtype of `frozen_dtype`."""
    from ..frozen.encoders import load_towers, load_vae

    if part.name == "vae":
        vae = load_vae(Path(file), device)
        return lambda images: dict(zip(("mean", "std"), vae.moments(images)))
    model, = load_towers((Path(file),), (tower,) if tower else (), device, frozen_dtype(device)).values()
    if part.before:
        return lambda images: {"hidden": model.before(images, part.before)}
    return lambda images: {"features": model(images)}


@dataclass(eq=False)
class Entries:
    """All entries that an index needs: each content once, by bucket, and within a bucket in the order of the index. An
    entry's number is its place here, which is the same for every reader of that index.

    keys: [N] binary(36). rows: [N] int64. targets: [N] bool, whether it is the target of that row, which is an edit.
    buckets: [N, 2] int16, height and width in pixels.
    """

    keys: pa.Array
    rows: np.ndarray
    targets: np.ndarray
    buckets: np.ndarray

    def bucket(self, number: int) -> tuple[int, int]:
        return tuple(self.buckets[number].tolist())

    def shard(self, numbers: np.ndarray) -> str:
        """The file name of these entries, which are of one bucket. It is a hash of their content."""
        keys = [key.hex() for key in self.keys.take(pa.array(numbers)).to_pylist()]
        height, width = self.bucket(numbers[0])
        return f"{height}x{width}-{digest(keys)[:16]}.safetensors"

    def cut(self, missing: np.ndarray) -> Iterator[np.ndarray]:
        """Divide ascending entry numbers into those of each shard."""
        starts = np.flatnonzero(np.diff(self.buckets[missing], axis=0, prepend=-1).any(1)).tolist()
        for first, end in zip(starts, [*starts[1:], len(missing)]):
            yield from (missing[at:min(at + SHARD, end)] for at in range(first, end, SHARD))


def wanted(index: Index, resolutions: tuple[int, ...]) -> Entries:
    members = ("", "target") if index.kind == EDITS else ("",)
    keys, rows, targets, buckets = [], [], [], []
    for resolution, member in ((r, m) for r in resolutions for m in members):
        found, named = keys_of(index, resolution, member)
        keys.append(named)
        rows.append(found)
        targets.append(np.full(len(found), member == "target"))
        buckets.append(index.buckets(resolution)[found])
    keys, rows, targets, buckets = pa.concat_arrays(keys), *map(np.concatenate, (rows, targets, buckets))
    _, first = np.unique(keys.dictionary_encode().indices.to_numpy(), return_index=True)
    order = np.sort(first)
    order = order[np.lexsort(buckets[order].T[::-1])]  # a stable sort: equal ones keep their order
    return Entries(keys.take(pa.array(order)), rows[order], targets[order], buckets[order])


def spread(runs: Runs) -> np.ndarray:
    return np.concatenate([np.arange(first, end) for first, end in runs])


class Fill:
    """A worker with one encoder: it turns decoded samples into shards."""

    def __init__(self, data: str, out: str, resolutions: tuple[int, ...], batch: int, part: dict, load: dict,
                 slot: int = 0):
        self.index, self.batch, self.part, self.out = Index.read(data), batch, Part(**part), out
        self.entries = wanted(self.index, resolutions)
        gpus = torch.cuda.device_count()  # Ray shows a worker only its own GPU
        self.device = torch.device("cuda", slot % gpus) if gpus else torch.device("cpu")
        self.encode = load_encoder(self.part, device=self.device, **load)

    def __call__(self, task: dict) -> dict:
        """task: {"runs": ranges of entry numbers, "shard": the file's name, which proves that the worker numbers
        alike}"""
        entries, numbers = self.entries, spread(task["runs"])
        if numbers[-1] >= len(entries.rows) or entries.shard(numbers) != task["shard"]:
            raise ValueError(f"{self.index.url} has changed while it was being cached; leave the set alone and start "
                             f"the same line again.")
        bucket = entries.bucket(numbers[0])

        def images(batch: int) -> list[Tensor]:
            chosen = numbers[batch * self.batch:(batch + 1) * self.batch]
            return [decode(self.index, row, bucket, "target" if target else "")
                    for row, target in zip(entries.rows[chosen].tolist(), entries.targets[chosen].tolist())]

        made: dict[str, list[Tensor]] = {}
        with Prefetch(images, ahead=2) as ahead, torch.inference_mode():
            for _ in range(0, len(numbers), self.batch):
                for name, value in self.encode(send(next(ahead), self.device)).items():
                    made.setdefault(name, []).append(value.half().cpu())
        tensors = {name: torch.cat(values).contiguous() for name, values in made.items()}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                row = entries.rows[numbers[int((~tensor.isfinite().flatten(1).all(1)).nonzero()[0])]]
                raise ValueError(f"{self.part.name} gives {name} beyond float16 for row {row} of {self.index.url}; "
                                 f"use this encoder online.")
        fs, root = locate(self.out)
        with whole_file(fs, posixpath.join(root, self.part.folder, "shards", task["shard"])) as stream:
            stream.write(safetensors.torch.save(tensors))
        return {"samples": len(numbers)}


def fill(made: Workers, config: Config, index: Index, entries: Entries, part: Part, load: dict) -> None:
    """Encode the missing entries and then write the cache's index, which makes it valid."""
    out = absolute(config.out)
    fs, root = locate(out)
    folder = posixpath.join(root, part.folder)
    there = listed(fs, posixpath.join(folder, "shards"))
    old = ENTRIES.empty_table()
    if fs.exists(posixpath.join(folder, NAME)):
        old = read_table(fs, posixpath.join(folder, NAME))
        stated = old.group_by(["shard", "size"]).aggregate([]).to_pylist()
        torn = {row["shard"] for row in stated if there.get(row["shard"]) != row["size"]}
        for shard in torn:
            there.pop(shard, None)  # the shard was cut short since, so it is made again
        old = old.filter(pc.invert(pc.is_in(old["shard"], pa.array(torn, pa.string()))))
    known = pc.is_in(entries.keys, old["key"].combine_chunks()).to_numpy(zero_copy_only=False)
    missing = np.flatnonzero(~known)
    tasks = [{"runs": ranges(numbers), "shard": (name := entries.shard(numbers)), "about": f"{part.name} of {name}",
              "size": len(numbers)} for numbers in entries.cut(missing)]
    todo = [task for task in tasks if task["shard"] not in there]
    setup = {"data": index.url, "out": out, "resolutions": config.resolutions or index.resolutions,
             "batch": config.batch, "part": asdict(part), "load": load}
    stream(made, Fill, todo, part.name, setup=setup)
    sweep(fs, posixpath.join(folder, "shards"))
    there = listed(fs, posixpath.join(folder, "shards"))
    new = [table_of(entries, task, there[task["shard"]]) for task in tasks]
    write_table(fs, posixpath.join(folder, NAME), pa.concat_tables([old, *new]))
    size = sum(there.values()) / 2 ** 30
    print(f"{part.name}: {len(missing)} of {len(known)} entries computed, {size:.3g} GB in {part.folder}")


def table_of(entries: Entries, task: dict, size: int) -> pa.Table:
    """The rows of the cache's index of one shard. size: its bytes."""
    count = task["size"]
    return pa.Table.from_arrays([entries.keys.take(pa.array(spread(task["runs"]))), pa.repeat(task["shard"], count),
                                 pa.array(np.arange(count), pa.int32()), pa.repeat(pa.scalar(size, pa.int64()), count)],
                                schema=ENTRIES)


def check_room(config: Config, entries: Entries, parts: list[tuple[Part, dict]]) -> None:
    """Print the size of the cache, and refuse a local disk without room for it. ValueError."""
    from ..frozen.encoders import tower_config

    count, pixels, bytes_ = len(entries.rows), int(entries.buckets.astype(np.int64).prod(1).sum()), 0.0
    for part, load in parts:
        if part.name == "vae":
            bytes_ += pixels / 64 * 16 * 2 * 2  # mean and deviation of FLUX.1's 16 channels at an eighth of the size
        else:
            tower = tower_config(Path(load["file"]), load["tower"])
            bytes_ += count * tower.grid[0] * tower.grid[1] * tower.width * 2
    print(f"{count} entries of {len(parts)} encoders, about {bytes_ / 2 ** 30:.3g} GB")
    fs, root = locate(absolute(config.out))
    if isinstance(fs, LocalFileSystem):
        fs.makedirs(root, exist_ok=True)
        free = shutil.disk_usage(root).free
        there = fs.du(root)
        if bytes_ > free + there:
            raise ValueError(f"{config.out} has {free / 2 ** 30:.3g} GB free and the cache takes about {bytes_ / 2 ** 30:.3g} GB; "
                             f"encode online, or leave out towers or resolutions.")


def fill_all(made: Workers, config: Config) -> None:
    index, parts = Index.read(absolute(config.data)), parts_of(config)
    entries = wanted(index, config.resolutions or index.resolutions)
    check_room(config, entries, parts)
    for part, load in parts:
        fill(made, config, index, entries, part, load)


def run(config: Config) -> bool:
    try:
        with stoppable(), workers(config.workers, config.ray, config.ray_address, torch.cuda.device_count()) as made:
            fill_all(made, config)
    except KeyboardInterrupt:
        print("Stopped. The same line goes on from here.")
        return False
    return True
