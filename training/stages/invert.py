"""`sda invert`: an embedding for every picture of a source, fitted through the frozen base. No adapter is needed.

A finished picture is a whole file in the output folder, and the same line goes on with the others. Each file says by
which settings and to which picture it was fitted.
"""
from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...kernels import checkpoint, embedding_file
from ...kernels.attention import Regions
from ...kernels.embedding import SemanticEmbedding
from ...kernels.fit import Fit
from ...kernels.replace import replacing
from ...kernels.text_space import TextSpace
from ...kernels.visibility import region_bias
from ..config import resolve_precisions, write_toml
from ..data.decode import send
from ..data.files import absolute, locate, write_json
from ..data.index import Index, is_ours
from ..data.pipeline import stoppable
from ..data.sources import listing
from ..engine import World
from ..engine.lock import alone
from ..engine.run_folder import duration
from ..frozen.base import base_sha256, load_flux
from ..frozen.encoders import load_vae
from ..frozen.flux import mu_of, network_time, velocity
from ..frozen.paint import paint
from ..frozen.region_attention import attend_by_region
from ..frozen.text_statistics import text_statistics
from .checks import prepared
from .invert_pictures import Done, LeftOut, Picture, batches, pictures
from .invert_prepared import passes
from .invert_settings import Config, check, identity
from .invert_start import from_fits, start_of

__all__ = ["Config", "Inverter", "run"]

TIMES = (0.2, 0.5, 0.8, 0.95)
"""Noise levels at which a picture's loss is told before and after its fit."""
PAINTED = 20  # steps of the sampler


class Inverter:
    """The frozen parts, and the fit of a batch of pictures through them."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.space = TextSpace(*text_statistics(config.base.text, []))
        self.start = start_of(config, self.space)
        self.vae = load_vae(config.base.vae, device)
        self.flux = load_flux(config.base.flux, config.base.precision, device)
        self.attention = attend_by_region(self.flux)
        if config.base.checkpointing:
            self.flux.enable_gradient_checkpointing()

    def fit(self, batch: Sequence[Picture]) -> tuple[SemanticEmbedding, Tensor, Tensor]:
        """(the embedding of the batch, the losses [B] before and after) of pictures of one bucket."""
        config, images = self.config, send([picture.pixels for picture in batch], self.device)
        latents = self.vae.moments(images)[0]
        edited = bool(batch[0].begin)
        start = (from_fits(config.out, batch) if edited else self.start(batch)).to(self.device)
        rows, cols = latents.shape[-2] // 2, latents.shape[-1] // 2
        self.attention.regions = regions_of(start, (rows, cols))
        fit = Fit(start, self.space, config.fit(mu_of(self.flux, rows * cols), edited))
        before = self.losses(latents, *fit.tokens())
        end = time.perf_counter() + 60 * config.minutes * len(batch)

        def predicted(x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor | None) -> Tensor:
            # The latents are noised to the time that the network reads, which a base in bf16 rounds.
            share = (network_time(self.flux, t) / t)[:, None, None, None]
            return self.velocity(latents + share * (x - latents), t, tokens, pooled)

        while not fit.done and not (fit.count and config.minutes and time.perf_counter() > end):
            fit.step(latents, predicted)
        return fit.result(), before, self.losses(latents, *fit.tokens())

    def velocity(self, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor | None) -> Tensor:
        if pooled is None:
            pooled = tokens.new_zeros(len(tokens), self.flux.config.pooled_projection_dim)
        guidance = torch.full_like(t, self.config.guidance) if self.flux.config.guidance_embeds else None
        return velocity(self.flux, x, t, tokens, pooled, guidance).float()

    @torch.no_grad()
    def losses(self, latents: Tensor, tokens: Tensor, pooled: Tensor | None) -> Tensor:
        """[B] the flow loss of each picture, the mean over TIMES, always with the same noise."""
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(latents)
        found = []
        for time_ in TIMES:
            t = torch.full((len(latents),), time_, device=self.device)
            x = latents + network_time(self.flux, t)[:, None, None, None] * (noise - latents)
            found.append((self.velocity(x, t, tokens, pooled) - (noise - latents)).square().flatten(1).mean(1))
        return torch.stack(found).mean(0)

    def paint(self, embedding: SemanticEmbedding, height: int, width: int) -> Image.Image:
        """What the base paints from an embedding of one picture."""
        side = 2 * self.vae.downsample
        regions = regions_of(embedding, (height // side, width // side))
        made = paint(self.flux, self.vae, embedding.tokens, embedding.pooled, regions, height, width, self.config.seed,
                     PAINTED)
        return Image.fromarray(made[0].mul(255).round().byte().permute(1, 2, 0).cpu().numpy())


def regions_of(embedding: SemanticEmbedding, grid: tuple[int, int]) -> Regions:
    """The visibility of an embedding whose tokens are the whole text of the joint sequence, on its device."""
    bias = region_bias(embedding.boxes, embedding.strengths, grid, embedding.token_count, masks=embedding.masks,
                       masked_by=embedding.masked_by)
    return Regions(bias.to(embedding.tokens.device))


class Folder:
    """The output folder: which embeddings are there, the lines of metrics.jsonl, and the report."""

    def __init__(self, config: Config):
        self.config, self.out = config, config.out
        self.base = base_sha256(config.base.flux)
        self.settings = identity(config, self.base)
        self.there = self.known()
        self.fitted, self.done, self.left_out = 0, 0, []
        write_toml(config, self.out / "config.toml")

    def known(self) -> dict[str, str]:
        """{file: sha256 of its picture} of the embeddings in the folder. ValueError where one was made otherwise."""
        found = {}
        for path in sorted(self.out.rglob(f"*{embedding_file.SUFFIX}")):
            made = checkpoint.read_header(path, embedding_file.KIND)["source"].get("invert", {})
            if made.get("settings") != self.settings:
                raise ValueError(f"{path} was made with other settings or another base; give the settings that "
                                 f"{self.out / 'config.toml'} holds, or another --out.")
            found[path.relative_to(self.out).as_posix()] = made["picture_sha256"]
        return found

    def rest(self, found: Iterable[Picture | LeftOut | Done]) -> Iterator[Picture]:
        """The pictures that are still to be fitted."""
        for it in found:
            if isinstance(it, LeftOut):
                self.left_out.append(it)
                print(f"{it.picture}: left out ({it.reason}: {it.detail})", flush=True)
            elif isinstance(it, Done):
                self.done += 1
            else:
                yield it

    def save(self, picture: Picture, embedding: SemanticEmbedding, pooled_width: int, **figures: float) -> None:
        """Write one picture's embedding and its line."""
        source = embedding.source | {"pooled_width": pooled_width, "invert": {
            "picture": picture.name, "picture_sha256": picture.sha256, "settings": self.settings,
            "base_sha256": self.base}}
        embedding_file.save(self.out / picture.file, replace(embedding, source=source), picture.thumbnail())
        self.fitted += 1
        line = {"picture": picture.name, "file": picture.file, **figures}
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(f"{picture.name}: loss {line['loss_before']:.4f} to {line['loss']:.4f} in {line['steps']} steps, "
              f"{duration(line['seconds'])}", flush=True)

    def report(self) -> None:
        fs, path = locate(str(self.out / "report.json"))
        write_json(fs, path, {"source": self.config.source, "settings": self.settings,
                              "fitted": self.fitted + self.done, "left_out": [vars(it) for it in self.left_out]})


def run(config: Config) -> bool:
    """Fit what is not there yet. False where a signal stopped it. ValueError where nothing in the source can be
    fitted."""
    world = World.start(config.device)
    if world.size > 1:
        raise ValueError("sda invert is one process; start one for each GPU, each with its own part of the pictures "
                         "and its own --out.")
    config = resolve_precisions(config, world.device, {})
    check(config)
    check_paint(config)
    source, captioned = absolute(config.source), config.start == "caption"
    index = Index.read(source) if prepared(source) and is_ours(source) else None
    chunks = [] if index else listing(source, config.path_column, config.caption_column)[0]
    with stoppable(), alone(config.out, world):
        folder = Folder(config)
        try:
            there = folder.there
            found = (passes(index, config.out, config.resolution, there, captioned) if index
                     else [pictures(chunks, config.resolution, there, captioned)])
            invert(config, folder, found, world.device)
        except KeyboardInterrupt:
            print("Stopped. The same line goes on from here.")
            return False
        finally:
            folder.report()
    print(f"{folder.fitted} pictures fitted, {folder.done} were there, {len(folder.left_out)} left out "
          f"({config.out / 'report.json'})")
    if not folder.fitted + folder.done:
        raise ValueError(f"No picture of {config.source} could be fitted; {config.out / 'report.json'} says why.")
    return True


def invert(config: Config, folder: Folder, found: Iterable[Iterable[Picture | LeftOut | Done]],
           device: torch.device) -> None:
    """Fit pass after pass of a source's pictures."""
    made = None  # the base is loaded for the first picture that needs it
    for batch in chain.from_iterable(batches(folder.rest(each), config.batch) for each in found):
        made = made or Inverter(config, device)
        began = time.perf_counter()
        embedding, before, after = made.fit(batch)
        seconds = (time.perf_counter() - began) / len(batch)
        for row, picture in enumerate(batch):
            pooled = None if embedding.pooled is None else embedding.pooled[row:row + 1]
            own = replace(embedding, tokens=embedding.tokens[row:row + 1], pooled=pooled)
            painted = made.paint(own, *picture.pixels.shape[1:]) if folder.fitted < config.paint else None
            if painted:
                with replacing((config.out / picture.file).with_suffix(".png")) as temporary:
                    painted.save(temporary, "PNG")
            folder.save(picture, own, made.flux.config.pooled_projection_dim, loss_before=before[row].item(),
                        loss=after[row].item(), steps=own.source["fit"]["steps"], seconds=seconds)


def check_paint(config: Config) -> None:
    """Refuse to paint into the source, where the next run would take the paintings for pictures. ValueError."""
    source = Path(absolute(config.source))
    if config.paint and source in (config.out.absolute(), *config.out.absolute().parents):
        raise ValueError(f"{config.out} lies in {config.source}, and what is painted there would be fitted too; give "
                         "another --out, or leave paint out.")
