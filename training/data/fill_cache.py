"""`sda cache`: the frozen encoders' outputs for a prepared set, computed once, on the GPUs where there are any."""
from __future__ import annotations

import posixpath
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from ...kernels.precision import frozen_dtype
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


class Fill:
    """A worker with one encoder: it turns decoded samples into shards."""

    def __init__(self, data: str, out: str, batch: int, part: dict, load: dict, slot: int = 0):
        self.index, self.batch, self.part, self.out = Index.read(data), batch, Part(**part), out
        gpus = torch.cuda.device_count()  # Ray shows a worker only its own GPU
        self.device = torch.device("cuda", slot % gpus) if gpus else torch.device("cpu")
        self.encode = load_encoder(self.part, device=self.device, **load)

    def __call__(self, task: dict) -> dict:
        """task: {"rows", "members", "bucket", "shard"}"""
        samples, bucket = list(zip(task["rows"], task["members"])), tuple(task["bucket"])

        def images(number: int) -> list[Tensor]:
            chosen = samples[number * self.batch:(number + 1) * self.batch]
            return [decode(self.index, row, bucket, member) for row, member in chosen]

        made: dict[str, list[Tensor]] = {}
        with Prefetch(images, ahead=2) as ahead, torch.inference_mode():
            for _ in range(0, len(samples), self.batch):
                for name, value in self.encode(send(next(ahead), self.device)).items():
                    made.setdefault(name, []).append(value.half().cpu())
        tensors = {name: torch.cat(values).contiguous() for name, values in made.items()}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                row = samples[int((~tensor.isfinite().flatten(1).all(1)).nonzero()[0])][0]
                raise ValueError(f"{self.part.name} gives {name} beyond float16 for row {row} of {self.index.url}; "
                                 f"use this encoder online.")
        fs, root = locate(self.out)
        with whole_file(fs, posixpath.join(root, self.part.folder, "shards", task["shard"])) as stream:
            stream.write(safetensors.torch.save(tensors))
        return {"samples": len(samples)}


def wanted(index: Index, resolutions: tuple[int, ...]) -> dict[bytes, tuple[int, str]]:
    """{key: (row, member)} of all that an index needs, each content once."""
    found: dict[bytes, tuple[int, str]] = {}
    for resolution in resolutions:
        for member in ("", "target") if index.kind == EDITS else ("",):
            rows, keys = keys_of(index, resolution, member)
            for row, key in zip(rows.tolist(), keys.to_pylist()):
                found.setdefault(key, (row, member))
    return found


def tasks_of(missing: dict[bytes, tuple[int, str]], part: Part) -> list[dict]:
    """Tasks for shards of one bucket each, named after their content."""
    by_bucket: dict[tuple[int, int], list[bytes]] = {}
    for key in missing:
        by_bucket.setdefault(tuple(np.frombuffer(key[32:], "<i2").tolist()), []).append(key)
    tasks = []
    for bucket, keys in sorted(by_bucket.items()):
        for i in range(0, len(keys), SHARD):
            chosen = keys[i:i + SHARD]
            rows, members = zip(*(missing[key] for key in chosen))
            name = f"{bucket[0]}x{bucket[1]}-{digest([key.hex() for key in chosen])[:16]}.safetensors"
            tasks.append({"rows": list(rows), "members": list(members), "bucket": list(bucket), "shard": name,
                          "about": f"{part.name} of {name}", "size": len(rows), "keys": chosen})
    return tasks


def fill(made: Workers, config: Config, index: Index, entries: dict[bytes, tuple[int, str]], part: Part,
         load: dict) -> None:
    """Encode the missing entries and then write the cache's index, which makes it valid."""
    out = absolute(config.out)
    fs, root = locate(out)
    folder = posixpath.join(root, part.folder)
    there = listed(fs, posixpath.join(folder, "shards"))
    old = ENTRIES.empty_table()
    if fs.exists(posixpath.join(folder, NAME)):
        old = read_table(fs, posixpath.join(folder, NAME))
        whole = np.array([there.get(e["shard"]) == e["size"] for e in old.select(["shard", "size"]).to_pylist()], bool)
        for shard in set(old.filter(pa.array(~whole)).column("shard").to_pylist()):
            there.pop(shard, None)  # the shard was cut short since, so it is made again
        old = old.filter(pa.array(whole))
    known = set(old.column("key").to_pylist())
    missing = {k: v for k, v in entries.items() if k not in known}
    tasks = tasks_of(missing, part)
    todo = [{k: v for k, v in task.items() if k != "keys"} for task in tasks if task["shard"] not in there]
    setup = {"data": index.url, "out": out, "batch": config.batch, "part": asdict(part), "load": load}
    stream(made, Fill, todo, part.name, setup=setup)
    sweep(fs, posixpath.join(folder, "shards"))
    there = listed(fs, posixpath.join(folder, "shards"))
    new = pa.Table.from_pylist([{"key": key, "shard": task["shard"], "place": place, "size": there[task["shard"]]}
                                for task in tasks for place, key in enumerate(task["keys"])], ENTRIES)
    write_table(fs, posixpath.join(folder, NAME), pa.concat_tables([old, new]))
    size = sum(there.values()) / 2 ** 30
    print(f"{part.name}: {len(missing)} of {len(entries)} entries computed, {size:.3g} GB in {part.folder}")


def check_room(config: Config, entries: dict[bytes, tuple[int, str]], parts: list[tuple[Part, dict]]) -> None:
    """Print the size of the cache, and refuse a local disk without room for it. ValueError."""
    from ..frozen.encoders import tower_config

    pixels = sum(int(np.prod(np.frombuffer(key[32:], "<i2").astype(int))) for key in entries)
    bytes_ = 0.0
    for part, load in parts:
        if part.name == "vae":
            bytes_ += pixels / 64 * 16 * 2 * 2  # mean and deviation of FLUX.1's 16 channels at an eighth of the size
        else:
            tower = tower_config(Path(load["file"]), load["tower"])
            bytes_ += len(entries) * tower.grid[0] * tower.grid[1] * tower.width * 2
    print(f"{len(entries)} entries of {len(parts)} encoders, about {bytes_ / 2 ** 30:.3g} GB")
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
