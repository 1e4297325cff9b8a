"""Settings of `sda train adapter`, and the checks for contradictions among them."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..config import RunConfig, free
from ..engine import World, check_shardable, check_sharding
from ..frozen.base import Precision, check_precision
from ..frozen.encoders import with_ids
from ..objectives.reconstruct import AdapterTraining, named_hierarchy


@dataclass(frozen=True)
class Base:
    flux: Path
    """FLUX.1-dev: flux1-dev.safetensors, or a diffusers folder."""
    vae: Path
    """Its VAE: ae.safetensors, or a diffusers folder."""
    text: Path
    """Statistics of its text encoder's outputs. They come from the file that `sda statistics` wrote, or from any
    exported adapter of the same base. They may also come from the text encoder itself, which reads some of the captions
    once, on the CPU: a diffusers folder with text_encoder_2 and tokenizer_2, or ComfyUI's t5xxl_fp16.safetensors beside
    a tokenizer."""
    precision: Precision = "auto"
    """Precision of the frozen weights. auto: bf16 where the device computes it fast, fp32 elsewhere. nf4 and int8 are
    for cards that bf16 (24 GB) does not fit."""
    sharded: bool = free(False)
    """Shard the base over the processes of each machine. Otherwise it is replicated, which is faster where it fits."""
    checkpointing: bool = free(True)
    """Compute the blocks again in the backward pass. A step takes half as long again, and a fraction of the memory."""


@dataclass(frozen=True)
class Data:
    index: str = free("")
    """The folder that `sda prepare` filled, or its fsspec URL."""
    cache: str = free("")
    """The folder that `sda cache` filled, or its URL. Cached outputs of the VAE and of the towers are not computed
    again. It keeps the latents' distributions in float16, so each visit draws anew."""
    resolutions: tuple[tuple, ...] = ((1.0, 512),)
    """Phases as (end, px, px, ...): until this share of the run each batch has one of these resolutions."""
    held_out: int = 32
    """Pictures kept from training for the validation, the same ones whatever the order of the set."""
    on_corrupt: Literal["stop", "skip"] = free("stop")
    """What happens where a picture can no longer be read: stop and name it, or take another one of its bucket. A
    held-out picture is then left out."""
    ahead: int = free(4)
    """Batches that are decoded ahead, by one thread each."""

    def phase(self, progress: float) -> str:
        """The name of the phase that a share of the run falls into."""
        return str(next(i for i, p in enumerate(self.resolutions) if progress < p[0] or p is self.resolutions[-1]))

    def pixels(self) -> tuple[int, ...]:
        """Every resolution of the run."""
        return tuple(sorted({int(px) for phase in self.resolutions for px in phase[1:]}))


@dataclass(frozen=True)
class Vision:
    files: tuple[Path, ...]
    """The vision towers' safetensors files, or their folders; a DINOv2 among them."""
    ids: tuple[str, ...] = ()
    """Which published encoder each file is (kernels/vision/known.py). "" for a file of this pack, whose record says
    it."""

    def named(self) -> list[tuple[Path, str]]:
        """Every file with its id."""
        return with_ids(self.files, self.ids)


@dataclass(frozen=True)
class Shape:
    table: str = "tree128"
    """The full query table: a preset or global<n>."""
    width: int = 1024
    heads: int = 16
    layers: int = 12
    pooled: bool = True
    """Whether the adapter also makes the pooled vector. It is zero otherwise."""


@dataclass(frozen=True)
class Validation:
    preset: str = free("tree128")
    """The hierarchy that validation encodes with."""
    resolution: int = 512
    """Resolution of the held-out pictures, in pixels. They are chosen among those that fill it."""
    times: tuple[float, ...] = free((0.2, 0.5, 0.8, 0.95))
    """Noise levels of the held-out loss."""
    pictures: int = free(8)
    """How many of the held-out pictures are painted."""
    steps: int = free(20)
    """Steps of the sampler."""
    guidance: float = free(3.5)
    """Guidance that a guidance-distilled base is given when it paints."""


@dataclass(frozen=True)
class Config:
    run: RunConfig
    base: Base
    vision: Vision
    data: Data
    adapter: Shape = field(default_factory=Shape)
    objective: AdapterTraining = field(default_factory=lambda: AdapterTraining(mu="resolution"))
    validation: Validation = field(default_factory=Validation)
    fits: Path | None = None
    """The folder of embeddings that `sda invert` fitted to pictures of this set, through this base. objective.distil
    weighs how near the adapter's come to them."""
    licence: str = free("not stated")
    """Licence of the exported file. FLUX.1-dev's own licence applies as well."""


def check_settings(config: Config) -> None:
    """Refuse in one sentence what contradicts itself. Needs neither files nor libraries nor processes. ValueError."""
    base, objective = config.base, config.objective
    if base.sharded:
        check_shardable(base.precision)
    if config.run.compile and base.precision in ("int8", "nf4"):
        raise ValueError(f"torch.compile cannot train through a base in {base.precision} (its compiler refuses the "
                         f"quantised weights); give --run.no-compile, or --base.precision bf16.")
    check_phases(objective.growth, "objective.growth", str)
    check_data(config.data)
    if bool(config.fits) != (objective.distil > 0):
        raise ValueError("Fits and objective.distil belong together; give both, or neither.")
    table = named_hierarchy(config.adapter.table)
    for name in {config.validation.preset, *(name for phase in objective.growth for name in phase[1:])}:
        named_hierarchy(name).index_in(table)


def check_base(base, world: World) -> None:
    """base: the settings with a precision and whether it is sharded. ValueError where the library is missing or the
    processes do not fit."""
    check_precision(base.precision)
    if base.sharded:
        check_sharding(base.precision, world)


def check_files(*files: tuple[Path | None, str]) -> None:
    """files: (path, the key that names it); a path of None is not checked."""
    for path, key in files:
        if path and not Path(path).exists():
            raise ValueError(f"{key}: there is no {path}; put it there or give its place with --{key}.")


def check_data(data: Data) -> None:
    check_phases(data.resolutions, "data.resolutions", int)
    if data.held_out < 1:
        raise ValueError("data.held_out must be at least 1: a run without held-out samples cannot be judged.")


def check_phases(phases: tuple[tuple, ...], key: str, choice: type) -> None:
    """choice: the type of the choices of a phase."""
    ends = [phase[0] for phase in phases if phase and type(phase[0]) in (int, float)]
    choices = [each for phase in phases for each in phase[1:]]
    if (len(ends) < len(phases) or ends != sorted(set(ends)) or not ends or ends[0] <= 0 or ends[-1] != 1
            or any(len(phase) < 2 for phase in phases) or any(type(each) is not choice for each in choices)):
        kind = "a name" if choice is str else "pixels"
        raise ValueError(f"{key} is a list of [end, choice, ...] with rising ends up to 1.0 and {kind} for each "
                         f"choice, not {[list(p) for p in phases]}.")
