"""Settings of `sda train gate`, and the checks before anything is loaded."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from diffusers import FluxTransformer2DModel

from ..config import RunConfig, free
from ..engine import World
from ..engine.lock import check_folder
from ..files import outline
from ..frozen.base import Precision, check_precision, skeleton
from ..frozen.encoders import vae_of
from ..objectives.augmentation import Augmentation
from ..objectives.gate import GateTraining
from .editor_settings import Validation, check_space
from .settings import Data, Vision, check_data, check_files


@dataclass(frozen=True)
class Base:
    flux: Path
    """FLUX.1 as a single file or a diffusers folder: the base that the adapter was trained through."""
    vae: Path
    """Its VAE: ae.safetensors, or a diffusers folder."""
    precision: Precision = "auto"
    """Precision of the frozen weights. auto: bf16 where the device computes it fast, fp32 elsewhere. nf4 is for cards that bf16
    (24 GB) does not fit."""
    checkpointing: bool = free(True)
    """Compute each block of Flux again in the backward pass instead of keeping its activations."""


@dataclass(frozen=True)
class Config:
    run: RunConfig
    base: Base
    data: Data
    """Edits that `sda prepare-edits` made; their instructions are not read."""
    adapter: Path | None = None
    """The adapter's file. Flux paints the edited picture under its embedding."""
    vision: Vision = field(default_factory=lambda: Vision(()))
    """The adapter's towers."""
    fits: Path | None = None
    """Instead of an adapter: the folder of embeddings that `sda invert` fitted to these edits, sources and targets."""
    presets: tuple[str, ...] = ("tree128", "tree64")
    """Hierarchy presets. Each batch takes one of them at random."""
    objective: GateTraining = field(default_factory=GateTraining)
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(identity=0.0, reversed=0.5))
    validation: Validation = field(default_factory=Validation)
    licence: str = free("not stated")
    """Licence of the exported file. FLUX.1-dev's own licence applies as well."""


def check(config: Config, world: World, absent: bool = False) -> FluxTransformer2DModel | None:
    """Refuse in one sentence what cannot work, before anything is loaded. Returns the base on the meta device, None where it is not
    there.

    absent: whether a file may still be missing. ValueError.
    """
    base = config.base
    check_space(config)
    if base.precision == "int8":
        raise ValueError("A LoRA is not trained through a base in int8 here; give --base.precision nf4 or bf16.")
    check_precision(base.precision)
    if config.run.compile and base.precision == "nf4":
        raise ValueError("torch.compile cannot train through a base in nf4 (its compiler refuses the quantised weights); give "
                         "--run.no-compile, or --base.precision bf16.")
    check_data(config.data)
    world.share(config.run.batch, config.run.micro)
    check_folder(config.run.out)
    if not absent:
        check_files((config.adapter, "adapter"), (config.fits, "fits"), (base.flux, "base.flux"), (base.vae, "base.vae"),
                    *((path, "vision.files") for path in config.vision.files))
    if base.vae.exists():
        vae_of(base.vae, outline)
    return skeleton(base.flux, outline)[0] if base.flux.exists() else None
