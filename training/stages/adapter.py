"""`sda train adapter`: the adapter through a frozen FLUX.1, on prepared pictures."""
from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...kernels.adapter import Adapter
from ...kernels.precision import autocast, frozen_dtype
from ...kernels.vision.towers import VisionTower
from ..data.decode import decode, send
from ..data.feed import Feed, Reader
from ..data.index import Index
from ..data.read_cache import Part
from ..engine import Step, World, compile_blocks, launch, shard_base
from ..engine.sealed import found
from ..frozen.base import base_sha256, load_flux
from ..frozen.encoders import load_towers, load_vae
from ..frozen.paint import paint
from ..frozen.region_attention import attend_by_region
from ..frozen.text_statistics import text_statistics
from ..objectives.reconstruct import AdapterObjective, Batch, named_hierarchy
from .adapter_export import build_adapter, write_adapter
from .checks import check, pictures_of
from .fits import Fits
from .held_out import Held, captions_of, feed_of
from .settings import Config

__all__ = ["AdapterStage", "Config", "run"]


class AdapterStage:
    name = "adapter"

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        world = World.start(config.run.device)
        outlines = check(config, world)
        train, self.held, self.plan = pictures_of(config)
        base, flux = config.base, outlines.flux.config
        self.vae = load_vae(base.vae, device)
        towers = load_towers(config.vision.files, config.vision.ids, device, frozen_dtype(device, config.run.precision))
        adapter = build_adapter(config, flux, [t.config for t in towers.values()]).to(device)
        self.place(adapter, world)
        # Hashing a base takes a minute, so one process does it for all.
        self.identity = world.broadcast({
            "base": base_sha256(base.flux), "vae": base_sha256(base.vae, "vae"),
            "towers": {name: base_sha256(path) for name, path in zip(towers, config.vision.files)}} if world.main
            else None)
        self.identity |= {"data": self.plan.hash, "held_out": self.held.hash,
                          "guidance_embeds": bool(flux.guidance_embeds),
                          "pooled_width": flux.pooled_projection_dim, "adapter": adapter.config.to_json()}
        self.fits = Fits(config.fits) if config.fits else None
        if self.fits:
            self.check_fits(self.fits)
        self.through_flux(adapter, towers, world)
        self.feed = self.make_feed(train, world)
        self.validation = Held(self.held, config.validation.resolution, config.data.on_corrupt, world, decode)

    def place(self, adapter: Adapter, world: World) -> None:
        """Give the adapter's outputs the text encoder's mean and deviation. A run that is resumed has them in its
        checkpoint."""
        config = self.config
        if config.run.resume == "auto" and not config.run.dry_run and found(config.run.out / "checkpoints"):
            return
        made = text_statistics(config.base.text, captions_of(self.plan.index)) if world.main else None
        adapter.set_text_statistics(*(each.to(self.device) for each in world.broadcast(made)))

    def check_fits(self, fits: Fits) -> None:
        """Refuse fits that this training cannot learn from. ValueError."""
        growth = self.config.objective.growth
        if fits.base_sha256 != self.identity["base"]:
            raise ValueError(f"The embeddings in {fits.folder} were fitted through another base than "
                             f"{self.config.base.flux}; give that base.")
        if not any(fits.preset in phase[1:] for phase in growth):
            raise ValueError(f"The embeddings in {fits.folder} are of the preset {fits.preset}, which objective.growth never "
                             "takes; add it there.")
        self.identity["fits"] = fits.hash

    def make_feed(self, train: Index, world: World) -> Feed:
        config, data = self.config, self.config.data
        parts = [Part("vae", self.identity["vae"])]
        parts += [Part(name, self.identity["towers"][name], self.kept_out(name)) for name in self.objective.towers]
        self.reader = Reader(train, parts, data.cache, data.pixels(), self.fits and self.fits.tokens)
        return feed_of(self.plan, config.run, data, world, self.reader)

    def kept_out(self, name: str) -> int:
        """How many of a tower's last blocks learn. A cache cannot hold their outputs."""
        return self.config.objective.unlock_blocks if self.objective.towers[name].config.kind == "dinov2" else 0

    def through_flux(self, adapter: Adapter, towers: dict[str, VisionTower], world: World) -> None:
        """Load the base, the largest part, after everything else has been checked."""
        config, base = self.config, self.config.base
        flux = load_flux(base.flux, base.precision, "cpu" if base.sharded else self.device)
        attention = attend_by_region(flux)
        if base.checkpointing:
            flux.enable_gradient_checkpointing()
        self.objective = AdapterObjective(flux, attention, adapter, towers, config.objective,
                                          self.fits and self.fits.hierarchy)
        # DINOv2's last blocks are trainables from the start, so that checkpoints never change shape; they learn late,
        # and in float32, for their steps are small.
        tuned = nn.ParameterList(self.objective.unlock())
        for parameter in tuned:
            parameter.data = parameter.data.float()
        self.trainables = nn.ModuleDict({"adapter": adapter, "tuned": tuned})
        if config.run.compile:
            compile_blocks(adapter.layers, flux.transformer_blocks, flux.single_transformer_blocks)
        if base.sharded:
            shard_base(flux, world)
        self.frozen = {"flux": flux, "vae": self.vae.vae, **towers}

    @property
    def adapter(self):
        return self.trainables["adapter"]

    def report(self) -> str:
        cached = ", ".join(self.reader.caches) or "nothing"
        return f"{self.validation.report('pictures')}, from the cache: {cached}\n{self.plan.report()}"

    def describe(self, step: Step) -> list[str]:
        return self.feed.describe(step)

    def effort(self, number: int) -> float:
        return float(self.plan.resolution(self.feed.phase(number), number)) ** 2

    def scales(self, step: int) -> dict[str, float]:
        settings = self.config.objective
        return {"tuned": settings.unlock_scale if step >= settings.unlock * self.config.run.planned else 0.0}

    def loss(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        samples = self.feed.samples(step)
        sample = {name: send([s[name] for s in samples], self.device) for name in samples[0]}
        images = sample.get("image")
        mean, deviation = (sample["mean"].float(), sample["std"].float()) if "mean" in sample else self.vae.moments(images)
        known = {}
        for name, tower in self.objective.towers.items():
            if f"{name}/hidden" in sample:
                known[name] = tower.after(sample[f"{name}/hidden"].float(), self.kept_out(name))
            elif f"{name}/features" in sample:
                known[name] = sample[f"{name}/features"]
        latents = mean + deviation * step.randn(*mean.shape[1:])
        return self.objective.loss(Batch(latents, images, known, sample.get("fitted")), step)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self.device, self.config.run.precision):
            return self.objective.embed(Batch(images, images), named_hierarchy(self.config.validation.preset))

    def validate(self) -> dict[str, float]:
        """The flow loss at each of the fixed times, and their mean. A picture gets the same noise at every
        validation."""
        settings, hierarchy = self.config.validation, named_hierarchy(self.config.validation.preset)
        own: dict[int, list[float]] = {}
        for share in self.validation.batches(len(self.held), self.config.run.micro or 4):
            images = send(share.samples, self.device)
            tokens, pooled = self.embed(images)
            latents = self.vae.moments(images)[0]
            noise = torch.stack([torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(row))
                                 for row in share.rows])
            with autocast(self.device, self.config.run.precision):
                flows = [self.objective.flow(latents, noise.to(self.device),
                                             torch.full((len(images),), time, device=self.device),
                                             tokens, pooled, hierarchy) for time in settings.times]
            if share.counts:
                own |= zip(share.rows, torch.stack(flows, 1).double().tolist())
        means = np.mean(list(self.validation.gathered(own).values()), 0).tolist()
        return {"flow": sum(means) / len(means),
                **{f"flow_{time:g}": mean for time, mean in zip(settings.times, means)}}

    def pictures(self) -> dict[str, np.ndarray]:
        """One grid: the held-out pictures above what Flux paints from their embeddings."""
        settings, world = self.config.validation, self.validation.world
        hierarchy = named_hierarchy(settings.preset)
        own: dict[int, np.ndarray] = {}
        for share in self.validation.batches(settings.pictures,
                                             min(self.config.run.micro or 4, -(-settings.pictures // world.size))):
            images = send(share.samples, self.device)
            height, width = images.shape[-2:]
            grid = (height // (2 * self.vae.downsample), width // (2 * self.vae.downsample))
            tokens, pooled = self.embed(images)
            with autocast(self.device, self.config.run.precision):
                painted = paint(self.objective.flux, self.vae, tokens, pooled,
                                self.objective.regions(hierarchy, grid, self.device),
                                height, width, share.rows, settings.steps, settings.guidance)
            if share.counts:
                own |= zip(share.rows, torch.cat([images, painted], 2).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
        columns = list(self.validation.gathered(own).values())
        return {"reconstructions": grid_of(columns)} if columns else {}

    def export(self, step: int) -> None:
        write_adapter(self.config, self.identity, self.adapter.state_dict(), list(self.trainables["tuned"]), step)


def grid_of(columns: list[np.ndarray], height: int = 768) -> np.ndarray:
    """Columns [H, W, 3] uint8 of different sizes beside one another, on white, each at most `height` pixels high."""
    made = []
    for column in columns:
        if len(column) > height:
            size = (round(column.shape[1] * height / len(column)), height)
            column = np.array(Image.fromarray(column).resize(size, Image.Resampling.LANCZOS))
        made.append(column)
    tallest = max(map(len, made))
    return np.concatenate([np.pad(c, ((0, tallest - len(c)), (0, 4), (0, 0)), constant_values=255) for c in made], 1)


def run(config: Config) -> bool:
    return launch(AdapterStage, config)
