"""Settings of `sda invert`, what it refuses before it reads the base, and what a file is made by."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffusers import FluxTransformer2DModel

from ...kernels import checkpoint
from ...kernels.adapter import AdapterConfig
from ...kernels.fit import ORDERS, FitSettings
from ...kernels.hierarchy import Hierarchy
from ..config import Count, NotNegative, Positive, Whole
from ..data.files import digest
from ..data.index import buckets
from ..engine.lock import check_folder
from ..frozen.base import Precision, base_sha256, check_precision
from ..frozen.encoders import check_tower, check_towers
from ..frozen.text import encoder_place
from ..frozen.text_statistics import is_statistics
from ..objectives.reconstruct import named_hierarchy
from .checks import frozen_outline
from .settings import Vision, check_files

WORDS = ("mean", "caption")
"""Starts that are no file."""


@dataclass(frozen=True)
class Base:
    flux: Path
    """FLUX.1-dev: flux1-dev.safetensors, or a diffusers folder."""
    vae: Path
    """Its VAE: ae.safetensors, or a diffusers folder."""
    text: Path
    """Statistics of its text encoder's outputs (the file of `sda statistics`, or any exported adapter of the same
    base), or the text encoder itself, which works on the CPU. start = "caption" needs the encoder."""
    precision: Precision = "auto"
    """Precision of the frozen weights. auto: bf16 where the device computes it fast, fp32 elsewhere. int8 is for cards
    of 16 GB, nf4 for smaller ones."""
    checkpointing: bool = True
    """Compute the blocks again in the backward pass. A step takes half as long again, and a fraction of the memory."""


@dataclass(frozen=True)
class Config:
    source: str
    """A folder (pictures at any depth, captions beside them), .tar files, or .parquet files with a column of paths or
    of pictures. A glob works too. So does an object store (s3://, ...). Or the folder of `sda prepare` or
    `sda prepare-edits`: then every edited picture goes on from its source's fit."""
    out: Path
    """Folder of the embeddings, named as the pictures are; report.json names the pictures that were left out."""
    base: Base
    start: str = "mean"
    """Where a fit begins. mean: the text encoder's mean, the same for every picture. caption: the picture's caption as
    the text encoder reads it. Or a file: an embedding, or an adapter, which encodes the picture (with vision.files)."""
    vision: Vision = field(default_factory=lambda: Vision(()))
    """The vision towers of an adapter that is the start. They work on the CPU, which takes seconds a picture."""
    preset: str = "tree128"
    """The hierarchy, by name or as global<n>. An embedding that is the start keeps its own."""
    resolution: int = 512
    """In pixels. A picture is cropped to the nearest of its buckets, as in training. Smaller pictures are left out."""
    steps: Count = FitSettings.steps
    """Steps of the fit, each one forward and one backward of the base."""
    rate: Positive = FitSettings.rate
    """Step of Adam, in deviations of the text space."""
    edited_steps: Count = 60
    """Steps by which the edited picture of a prepared edit goes on from its source's fit."""
    edited_rate: Positive = 0.15
    order: Literal[ORDERS] = FitSettings.order
    """Whether the coarse levels learn first, or all from the start."""
    pooled: bool = False
    """Whether the pooled vector is fitted as well. The start must have one."""
    guidance: float = 3.5
    """Guidance that a guidance-distilled base (FLUX.1-dev) is given: that with which the pictures will be painted."""
    seed: int = 0
    """Seed of the noise and of the times."""
    minutes: NotNegative = 0.0
    """The fit of a picture ends after this time, with what it has. 0: there is no limit."""
    batch: Count = 1
    """Pictures of one bucket that are fitted at once. A picture's fit does not depend on the others."""
    paint: Whole = 0
    """Paint this many pictures from their embeddings, in 20 steps, beside them."""
    path_column: str = ""
    """Column of parquet files. Empty: found by its name."""
    caption_column: str = ""
    device: str = "auto"

    @property
    def start_file(self) -> Path | None:
        return None if self.start in WORDS else Path(self.start)

    def fit(self, shift: float, edited: bool = False) -> FitSettings:
        steps, rate = (self.edited_steps, self.edited_rate) if edited else (self.steps, self.rate)
        order = "all levels" if edited else self.order  # all have learnt already
        return FitSettings(steps, rate, order, self.pooled, shift=shift, seed=self.seed)


def check(config: Config, absent: bool = False) -> FluxTransformer2DModel | None:
    """Refuse in one sentence what cannot work. Only the headers of files are read. Returns the base on the meta device,
    None where it is not there.

    absent: whether a file may still be missing. ValueError.
    """
    base, start = config.base, config.start_file
    config.fit(0.5)
    config.fit(0.5, edited=True)
    buckets(config.resolution)
    named_hierarchy(config.preset)
    check_precision(base.precision)
    check_folder(config.out)
    if not absent:
        check_files((base.flux, "base.flux"), (base.vae, "base.vae"), (base.text, "base.text"), (start, "start"),
                    *((path, "vision.files") for path in config.vision.files))
    flux = frozen_outline(base)
    if config.start == "caption" and base.text.exists() and is_statistics(base.text):
        raise ValueError(f"{base.text} holds statistics, which read no captions; give the text encoder itself as "
                         "base.text, or start = \"mean\".")
    if config.pooled and start is None:
        raise ValueError(f"A start from the {config.start} has no pooled vector to fit; start from an adapter's or an "
                         "embedding's, or leave pooled out.")
    if start is not None and start.exists():
        check_start(config, start, flux)
    return flux


def check_start(config: Config, start: Path, flux: FluxTransformer2DModel | None) -> None:
    """Refuse a file that no fit of this configuration can begin with. ValueError."""
    record = checkpoint.read_header(start)
    if record["kind"] == "adapter":
        made = AdapterConfig.from_json(record["config"])
        named_hierarchy(config.preset).index_in(Hierarchy.from_json(made.to_json()["hierarchy"]))
        if all(path.exists() for path in config.vision.files):
            for path, name in config.vision.named():
                check_tower(path, name)
            check_towers(config.vision.named(), start, record)
        width, pooled = made.out_dim, made.pooled_dim
    elif record["kind"] == "embedding":
        if record["config"]["batch"] != 1:
            raise ValueError(f"{start} holds the embeddings of {record['config']['batch']} pictures; give a file of "
                             "one.")
        width, pooled = record["widths"]["text"], record["widths"]["pooled"]
    else:
        raise ValueError(f"{start} holds a checkpoint of kind '{record['kind']}'; start from an embedding, an adapter, "
                         f"or one of {', '.join(WORDS)}.")
    if config.pooled and not pooled:
        raise ValueError(f"{start} makes no pooled vector to fit; take another start, or leave pooled out.")
    if flux is not None and width != flux.config.joint_attention_dim:
        raise ValueError(f"{start} is of width {width} and the base reads texts of {flux.config.joint_attention_dim}; "
                         "start from one that was made with this base.")


def identity(config: Config, flux: str) -> str:
    """A hash of all that decides the numbers of a picture's embedding, beside the picture. Files count by their
    contents. The precision must be decided ("auto" is none). flux: the hash of the base."""
    base, start = config.base, config.start_file
    if start is not None:
        trained = checkpoint.read_header(start).get("base_sha256", flux)
        if trained != flux:
            raise ValueError(f"{start} was trained through another base (sha256 {trained[:12]}) than {base.flux} "
                             f"({flux[:12]}); give the base of the adapter.")
    files = {"flux": flux, "vae": base_sha256(base.vae, "vae"), "text": base_sha256(encoder_place(base.text)),
             "start": config.start if start is None else base_sha256(start),
             "vision": [base_sha256(path) for path in config.vision.files]}
    keys = ("preset", "resolution", "steps", "rate", "edited_steps", "edited_rate", "order", "pooled", "guidance", "seed", "minutes")
    return digest(files, base.precision, {key: getattr(config, key) for key in keys})
