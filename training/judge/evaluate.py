"""`sda evaluate`: repaint pictures from their embeddings, carry out edits, and measure and show both.

The run folder holds `pictures/` (one folder for each sample), `results.json` and `index.html`. A painted picture is not
painted again. The measures are taken anew each time, so that one can be added without painting.
"""
from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..config import resolve_precisions
from ..data.pipeline import stoppable
from ..engine.world import pick_device
from ..frozen.base import Precision
from ..objectives.reconstruct import named_hierarchy
from . import page
from .encoders import to_tensor
from .measures import EDITS, RECONSTRUCTION, Judge
from .metrics import summary
from .painter import Files, Painter, seed_of
from .samples import Edits, Pictures, Sample, Skipped

VAE = "vae"  # the autoencoder's round trip: the ceiling
# the painted unedited embedding, and the source picture itself: an edit must beat both
COPY, NOTHING = "unedited", "source"
PROTOCOL = ("seed", "steps", "guidance", "resolution", "precision")  # these decide the pixels, beside the files
SOFTWARE = ("torch", "diffusers", "transformers", "open_clip_torch", "torchmetrics", "lpips")


@dataclass(frozen=True)
class Config:
    out: Path
    """Folder for pictures/, results.json and index.html. A second run continues in it."""
    flux: Path
    """The base: a BFL single file, a diffusers folder, or the miniature's file."""
    adapter: Path
    vae: Path
    towers: tuple[Path, ...]
    """The adapter's vision towers: this pack's files, or published ones that tower_ids names."""
    tower_ids: tuple[str, ...] = ()
    """For each tower the id of a published encoder, "" where the file's record has it. Left out where every file has
    it."""
    images: str = ""
    """Pictures to reconstruct: a folder or URL of picture files, or one that `sda prepare` filled."""
    edits: str = ""
    """Edits to carry out: a folder or URL that `sda prepare-edits` filled. Needs editor and text."""
    editor: Path | None = None
    text: Path | None = None
    """The base's text encoder, which reads the instructions."""
    tokenizer: Path | None = None
    """Folder of its tokenizer, where it is not beside it."""
    presets: tuple[str, ...] = ("tree128",)
    """Hierarchies to reconstruct with, by name or as global<n>. Edits take the first."""
    mode: Literal["parallel", "autoregressive"] = "parallel"
    """Modes of the edit decoder."""
    limit: int = 0
    """Take only this many pictures and this many edits, the first ones. 0 takes all."""
    resolution: int = 512
    """Resolution in pixels. Pictures are cropped to its aspect buckets."""
    steps: int = 28
    """Euler steps of Flux."""
    guidance: float = 3.5
    """Guidance that a guidance-distilled base (FLUX.1-dev) is given."""
    seed: int = 0
    """Seed of the noise, which depends on it and on the picture alone."""
    batch: int = 8
    """Pictures painted at once."""
    precision: Precision = "auto"
    """Precision of Flux: bf16, fp32, int8 or nf4. auto: the one that the folder began with or, for a new one, bf16
    where the device computes it fast and fp32 elsewhere."""
    device: str = "auto"
    clip: Path | None = None
    """CLIP of the measures: a transformers or open_clip folder, or a tower's file."""
    dino: Path | None = None
    """DINO of the measures. DreamBooth and MagicBrush take dino-vits16."""
    structure: Path | None = None
    """DINO of the structure distance. Splice takes dino-vitb8."""
    lpips: Path | None = None
    """Backbone of LPIPS: the safetensors of torchvision's AlexNet, SqueezeNet 1.1 or VGG-16."""


@dataclass(frozen=True)
class Task:
    """One of the two tasks that are judged: its samples, the pictures painted of them, and their measures."""

    name: str
    samples: Pictures
    painted: tuple[str, ...]
    measures: tuple[str, ...]


def tasks_of(config: Config) -> list[Task]:
    if not config.images and not config.edits:
        raise ValueError("There is nothing to judge: give --images, --edits or both.")
    if config.limit < 0 or config.batch < 1 or config.steps < 1:
        raise ValueError("--limit must be at least 0, --batch and --steps at least 1.")
    for preset in config.presets:
        named_hierarchy(preset)  # it refuses an unknown one before anything loads
    tasks = []
    if config.images:
        tasks.append(Task("reconstruction", Pictures(config.images, config.resolution), (VAE, *config.presets),
                          RECONSTRUCTION))
    if config.edits:
        for key in ("editor", "text"):
            if getattr(config, key) is None:
                raise ValueError(f"Edits need --{key}: give its file, or leave --edits out.")
        tasks.append(Task("edits", Edits(config.edits, config.resolution), (COPY, config.mode), EDITS))
    return tasks


def run(config: Config) -> bool:
    """Run the command. False where a signal stopped it; the same command then continues."""
    tasks = tasks_of(config)
    make_writable(config.out)
    try:
        with stoppable():
            judge(config, tasks)
    except KeyboardInterrupt:
        print("Stopped. The same line goes on from here.")
        return False
    return True


def judge(config: Config, tasks: list[Task]) -> None:
    """Load, paint, measure and write the results."""
    device, agreed = pick_device(config.device), config.out / "protocol.json"
    began = json.loads(agreed.read_text(encoding="utf-8")) if agreed.exists() else {}
    config = resolve_precisions(config, device, began)
    print(f"Flux paints in {config.precision} on {device.type}", flush=True)
    eyes = Judge({name: getattr(config, name) for name in ("clip", "dino", "structure", "lpips")}, device)
    painter = Painter(Files(**{field.name: getattr(config, field.name) for field in fields(Files)}), device,
                      config.precision)
    protocol = {key: getattr(config, key) for key in PROTOCOL} | painter.describe()
    agree(agreed, began, protocol)
    if painter.editor is not None:
        painter.editor.check_mode(config.mode)
    results = {"made": str(date.today()), "protocol": protocol, "measures": eyes.describe(), "device": str(device),
               "software": {name: version(name) for name in SOFTWARE}, "tasks": {}}
    for task in tasks:
        results["tasks"][task.name] = carry_out(task, config, painter, eyes)
    write(config.out / "results.json", json.dumps(finite(results), indent=1, ensure_ascii=False, allow_nan=False))
    write(config.out / "index.html", page.page(results, config.out))
    print(page.table(results))
    print(f"side by side: {config.out / 'index.html'}")


def carry_out(task: Task, config: Config, painter: Painter, eyes: Judge) -> dict:
    """Paint and measure one task. Returns its part of results.json."""
    folder, found, skipped = config.out / "pictures" / task.name, [], []
    with tqdm(total=min(len(task.samples), config.limit or len(task.samples)), desc=task.name, unit="picture") as bar:
        for batch in batches(task.samples, config, skipped):
            paint(painter, task, config, folder, batch)
            for sample in batch:
                found.append(measured(eyes, task, folder, sample))
            bar.update(len(found) + len(skipped) - bar.n)
    for each in skipped:
        print(f"left out: {each.name}: {each.reason}")
    if not found:
        reason = f"{skipped[0].name}: {skipped[0].reason}" if skipped else "it is empty"
        raise ValueError(f"Nothing in {task.samples.place} could be judged ({reason}): "
                         "give other pictures or a lower --resolution.")
    names = list(found[0]["values"])
    means = {name: {measure: summary([it["values"][name][measure] for it in found if measure in it["values"][name]])
                    for measure in task.measures if any(measure in it["values"][name] for it in found)}
                    for name in names}
    return {"set": task.samples.describe(), "count": len(found), "missing": eyes.missing(task.measures),
            "skipped": [vars(each) for each in skipped], "means": means, "samples": found}


def batches(samples: Pictures, config: Config, skipped: list[Skipped]) -> Iterator[list[Sample]]:
    """Batches of samples of one size, at most `batch` of them. The same picture twice counts once. Left-out samples go
    to `skipped`."""
    waiting: dict[tuple, list[Sample]] = {}
    seen: dict[str, str] = {}
    for sample in samples:
        if isinstance(sample, Skipped):
            skipped.append(sample)
            continue
        if sample.key in seen:
            skipped.append(Skipped(sample.name, f"the same as {seen[sample.key]}"))
            continue
        seen[sample.key] = sample.name
        alike = waiting.setdefault(sample.source.shape, [])
        alike.append(sample)
        if len(alike) == config.batch:
            yield waiting.pop(sample.source.shape)
        if len(seen) == config.limit:
            break
    yield from waiting.values()


def paint(painter: Painter, task: Task, config: Config, folder: Path, batch: list[Sample]) -> None:
    """Write the missing pictures: the samples' own and those painted of them."""
    for sample in batch:
        for name, picture in (("source", sample.source), ("target", sample.target)):
            if picture is not None:
                save(folder / sample.key / f"{name}.png", picture)
    for name in task.painted:
        rest = [sample for sample in batch if not (folder / sample.key / f"{name}.png").exists()]
        if not rest:
            continue
        pictures = to_tensor([sample.source for sample in rest])
        if name == VAE:
            made = painter.round_trip(pictures)
        else:
            embedding = painter.embed(pictures, named_hierarchy(config.presets[0] if task.name == "edits" else name))
            if name == config.mode:
                embedding = painter.edit(embedding, [sample.instruction for sample in rest], name)
            seeds = [seed_of(sample.key, config.seed) for sample in rest]
            made = painter.paint(embedding, pictures.shape[-2:], seeds, config.steps, config.guidance)
        for sample, picture in zip(rest, made):
            save(folder / sample.key / f"{name}.png", picture)


def measured(eyes: Judge, task: Task, folder: Path, sample: Sample) -> dict:
    """A sample's record: its identity, and its measures by what was painted."""
    painted = {name: np.asarray(Image.open(folder / sample.key / f"{name}.png")) for name in task.painted}
    record = {"key": sample.key, "name": sample.name, "size": list(sample.source.shape[:2])}
    if task.name == "reconstruction":
        return record | {"values": eyes.reconstruction(sample.source, painted)}
    said = {"instruction": sample.instruction, "captions": list(sample.captions)}
    return record | said | {"values": eyes.edits(sample, {NOTHING: sample.source, **painted})}


def make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): give another --out.") from error


def agree(file: Path, before: dict, now: dict) -> None:
    """Refuse a folder whose pictures were painted under another protocol. Files that were not needed before may be
    added."""
    for key in before.keys() & now.keys():
        if before[key] != now[key]:
            raise ValueError(f"{file.parent} holds pictures of another {key} ({before[key]}, now {now[key]}): "
                             "give another --out.")
    write(file, json.dumps(before | now, indent=1))


def save(file: Path, picture: np.ndarray) -> None:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file.with_suffix(".part"), "PNG")
        os.replace(file.with_suffix(".part"), file)


def write(file: Path, text: str) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def finite(value):
    """The value as JSON has it: infinite numbers are null, at any depth."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
