"""What `sda train adapter` refuses before it reads the base, and `sda plan` before anything is bought: one list."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel

from ...kernels.vision.towers import TowerConfig
from ..data.batches import Plan
from ..data.feed import split
from ..data.files import listed, locate
from ..data.index import NAME, Index
from ..engine import World
from ..engine.lock import check_folder
from ..files import outline
from ..frozen.base import skeleton
from ..frozen.encoders import check_tower, vae_of
from ..frozen.text_statistics import check_statistics
from .adapter_export import build_adapter
from .held_out import plan_of
from .settings import Config, check_base, check_files, check_settings


@dataclass(frozen=True)
class Outlines:
    """What the headers of a configuration's files say. None, or left out, for files that are not there."""

    flux: FluxTransformer2DModel | None
    """The base, on the meta device."""
    towers: dict[int, TowerConfig]
    """The towers by their place in vision.files."""


def check(config: Config, world: World, absent: bool = False) -> Outlines:
    """Refuse in one sentence what cannot work: settings, processes, libraries, and files that are missing or unfit.
    Only the headers of files are read. absent: whether a file may still be missing. ValueError."""
    base, vision = config.base, config.vision.named()
    check_settings(config)
    check_base(base, world)
    world.share(config.run.batch, config.run.micro)
    check_folder(config.run.out)
    if not absent:
        check_files((base.flux, "base.flux"), (base.vae, "base.vae"), (base.text, "base.text"),
                    (config.fits, "fits"), *((path, "vision.files") for path, _ in vision))
    towers = {place: check_tower(path, name) for place, (path, name) in enumerate(vision) if path.exists()}
    known = [each.id for each in towers.values()]
    if len(set(known)) < len(known):
        raise ValueError("The same vision tower is listed twice; list every tower once.")
    if len(towers) == len(vision) and not any(each.kind == "dinov2" for each in towers.values()):
        raise ValueError("There is no DINOv2 among the vision towers; add one to vision.files.")
    flux = frozen_outline(base)
    if flux and len(towers) == len(vision):
        with torch.device("meta"):
            build_adapter(config, flux.config, list(towers.values()))
    return Outlines(flux, towers)


def frozen_outline(base) -> FluxTransformer2DModel | None:
    """The base on the meta device, None where it is not there. base: settings with flux, vae and text. ValueError where
    those that are there do not belong together."""
    flux = skeleton(base.flux, outline)[0] if base.flux.exists() else None
    vae = vae_of(base.vae, outline)[0] if base.vae.exists() else None
    if flux and vae and 4 * vae.config.latent_channels != flux.config.in_channels:
        raise ValueError(f"{base.vae} has {vae.config.latent_channels} channels and {base.flux} paints latents of "
                         f"{flux.config.in_channels // 4}; give the VAE that belongs to the base.")
    if flux and base.text.exists():
        check_statistics(base.text, flux.config.joint_attention_dim)
    return flux


def prepared(url: str) -> bool:
    """Whether `sda prepare` has filled a folder."""
    return bool(url) and NAME in listed(*locate(url))


def pictures_of(config: Config) -> tuple[Index, Index, Plan]:
    """(pictures to train on, held-out pictures, the plan of the batches). ValueError where they are not enough for the
    configuration."""
    index = Index.read(config.data.index)
    if index.kind != "pictures":
        raise ValueError(f"{config.data.index} holds edits, not pictures; prepare pictures with `sda prepare`.")
    train, held = split(index, config.data.held_out, config.validation.resolution)
    return train, held, plan_of(train, config.run, config.data)
