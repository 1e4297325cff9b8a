"""`sda train editor`: the edit decoder on prepared edits, towards the embedding of the edited picture: a frozen
adapter's, or one that was fitted."""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ...kernels.precision import autocast, frozen_dtype
from ..data.feed import split
from ..data.index import Index
from ..engine import Step, World, compile_blocks, launch, shard_base
from ..frozen.base import base_sha256, load_flux
from ..frozen.encoders import load_vae
from ..frozen.paint import paint
from ..frozen.text import load_instruction_encoder
from ..objectives.augmentation import augmented
from ..objectives.edit import editor_loss
from ..objectives.edit_flow import EditFlow
from ..objectives.lora import Learned
from ..objectives.reconstruct import named_hierarchy, regions_for
from .edit_reader import EditReader, Side, sent
from .editor_export import write_editor
from .editor_settings import Config, check, new_decoder
from .editor_space import space_of
from .held_out import Held, feed_of, plan_of

__all__ = ["Config", "EditorStage", "run"]

MEASURED = 256  # pictures over which the statistics of the adapter's tokens are taken


class EditorStage:
    name, check = "editor", staticmethod(check)

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        world = World.start(config.run.device)
        self.check(config, world)
        self.space = space_of(config, device)
        self.data(world)
        self.networks(world)
        self.identity = world.broadcast(self.fingerprint() if world.main else None)

    def data(self, world: World) -> None:
        run, data = self.config.run, self.config.data
        index = Index.read(data.index)
        if index.kind != "edits":
            raise ValueError(f"{data.index} holds pictures, not edits; prepare the edits with `sda prepare-edits`.")
        self.unknown, index = len(index), self.space.of(index)
        self.unknown -= len(index)
        resolution = self.config.validation.resolution
        train, self.held = split(index, data.held_out, resolution)
        self.plan = plan_of(train, run, data)
        self.validation = Held(self.held, resolution, data.on_corrupt, world, self.reader(self.held, (resolution,)))
        self.feed = feed_of(self.plan, run, data, world, self.reader(train, data.pixels()))

    def reader(self, index: Index, resolutions: tuple[int, ...]) -> EditReader:
        return self.space.reader(index, resolutions, bool(self.config.flow.weight))

    def networks(self, world: World) -> None:
        config, device = self.config, self.device
        half = frozen_dtype(device, config.run.precision)
        self.space.load()
        self.text = load_instruction_encoder(config.text.path, device, config.text.tokenizer, config.text.length,
                                             config.text.precision)
        space = self.space.width, self.text.width, self.space.hierarchy
        self.decoder = new_decoder(config.decoder, space, half).to(device).train()
        if config.decoder.start is None:
            self.decoder.set_token_statistics(*self.statistics())
        self.trainables = nn.ModuleDict({"decoder": Learned(self.decoder)})
        self.frozen = {**self.space.frozen, "text": self.text.model}
        if config.decoder.architecture == "causal_lm" and config.decoder.lora_rank:
            self.frozen["llm"] = self.decoder.llm
        if config.run.compile:
            compile_blocks(self.space.blocks, self.decoder.blocks)
        self.flow = self.through_flux(world) if config.flow.weight else None

    def through_flux(self, world: World) -> EditFlow:
        config, base = self.config, self.config.base
        self.check_base()
        flux = load_flux(base.flux, base.precision, "cpu" if base.sharded else self.device)
        flow = EditFlow(flux, load_vae(base.vae, self.device), config.flow, self.space.masked)
        if base.checkpointing:
            flux.enable_gradient_checkpointing()
        if config.run.compile and base.precision not in ("int8", "nf4"):  # the compiler refuses quantised weights
            compile_blocks(flux.transformer_blocks, flux.single_transformer_blocks)
        if base.sharded:
            shard_base(flux, world)
        self.frozen |= {"flux": flux, "vae": flow.vae.vae}
        return flow

    def check_base(self) -> None:
        config = self.config
        if base_sha256(config.base.flux) != self.space.base_sha256:
            raise ValueError(f"{config.adapter or config.fits} was trained through another base than {config.base.flux}; give "
                             "that base.")

    def fingerprint(self) -> dict:
        config = self.config
        begun = config.decoder.llm or config.decoder.start
        return {"data": self.plan.hash, "held_out": self.held.hash, "text": self.text.hash, **self.space.identity,
                "begun_from": base_sha256(begun) if begun else None, "decoder": self.decoder.config.to_json()}

    def report(self) -> str:
        unknown = f", {self.unknown} left out because they are not fitted" if self.unknown else ""
        return f"{self.validation.report('edits')}{unknown}\n{self.plan.report()}"

    def describe(self, step: Step) -> list[str]:
        return self.feed.describe(step)

    @torch.no_grad()
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the space's tokens over the source pictures of the first batches."""
        hierarchy, tokens, number = named_hierarchy(self.config.presets[0]), [], 0
        while sum(map(len, tokens)) < MEASURED * hierarchy.token_count:
            count = min(32, self.config.run.batch)
            step = Step(number, self.config.run.max_steps, 0, self.name, self.device, range(count), count)
            sources = sent([source for source, _, _ in self.feed.samples(step)], self.device)
            tokens.append(self.space.embed([sources], hierarchy)[0].flatten(0, 1))
            number += 1
        self.feed.close()
        tokens = torch.cat(tokens)
        return tokens.mean(0), tokens.std(0)

    def losses(self, source: Side, target: Side, texts: list[str], preset: str,
               step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        hierarchy, count = named_hierarchy(preset), len(texts)
        tokens, pooled = self.space.embed([source, target], hierarchy)
        flow = None
        if self.flow is not None:
            own = None if pooled is None else pooled[:count]  # an edit keeps the pooled vector of its source
            flow = lambda written: self.flow.loss(written, own, hierarchy, source[0], target[0], step)  # noqa: E731
        return editor_loss(self.decoder, *tokens.chunk(2), hierarchy.boxes(), hierarchy.level_ids(), self.text(texts),
                           self.config.objective, step, flow, self.config.flow.weight)

    def loss(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        samples = [augmented(sample, *draws, self.config.augmentation)
                   for sample, draws in zip(self.feed.samples(step), step.rand(2).tolist())]
        presets = self.config.presets
        preset = presets[int(torch.randint(len(presets), (), generator=step.shared()))]
        return self.losses(*self.batch(samples), preset, step)

    def batch(self, samples: list) -> tuple[Side, Side, list[str]]:
        """(sources, targets, instructions) of samples of one bucket, on the device."""
        source, target, texts = zip(*samples)
        return sent(source, self.device), sent(target, self.device), list(texts)

    def effort(self, number: int) -> float:
        return float(self.plan.resolution(self.feed.phase(number), number)) ** 2

    def scales(self, step: int) -> dict[str, float]:
        return {}

    def validate(self) -> dict[str, float]:
        """The parts of the loss over the held-out edits. Noise and times are the same at every validation."""
        own: dict[int, tuple[int, dict[str, float]]] = {}
        self.measuring(True)
        with autocast(self.device, self.config.run.precision):
            for share in self.validation.batches(len(self.held), self.config.run.micro or 16):
                count = len(share.rows)
                step = Step(share.number, 1, 0, "validation", self.device, range(count), count)
                _, parts = self.losses(*self.batch(share.samples), self.config.validation.preset, step)
                if share.counts:
                    own[share.number] = count, {name: float(value.detach()) for name, value in parts.items()}
        self.measuring(False)
        found = list(self.validation.gathered(own).values())
        seen = sum(count for count, _ in found)
        return {name: sum(count * parts[name] for count, parts in found) / seen for name in found[0][1]}

    def measuring(self, now: bool) -> None:
        """What is trained measures, or goes on learning."""
        self.decoder.train(not now)

    def paints(self) -> bool:
        return self.flow is not None

    @torch.no_grad()
    def pictures(self) -> dict[str, np.ndarray]:
        """Held-out edits of one shape, one per row: source, painted from the written embedding, painted from the true
        one, target."""
        if not self.paints():
            return {}
        settings, world = self.config.validation, self.validation.world
        own: dict[int, np.ndarray] = {}
        for share in self.validation.batches(settings.pictures,
                                             min(self.config.run.micro or 16, -(-settings.pictures // world.size))):
            rows = self.painted(*self.batch(share.samples), share.rows)
            if share.counts:
                own |= zip(share.rows, rows.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
        rows = list(self.validation.gathered(own).values())
        return {"edits": np.concatenate([row for row in rows if row.shape == rows[0].shape])} if rows else {}

    def painted(self, source: Side, target: Side, texts: list[str], seeds: list[int]) -> Tensor:
        """[B, 3, H, 4 W] in [0, 1]: one row of `pictures` per edit."""
        settings, hierarchy = self.config.validation, named_hierarchy(self.config.validation.preset)
        height, width = source[0].shape[-2:]
        tokens, pooled = self.space.embed([source, target], hierarchy)
        tokens, truth = tokens.chunk(2)
        pooled = None if pooled is None else pooled[:len(texts)]
        side = 2 * self.flow.vae.downsample
        regions = regions_for(hierarchy, (height // side, width // side), self.device) if self.flow.masked else None
        with autocast(self.device, self.config.run.precision):
            written = self.decoder.generate(tokens, hierarchy.boxes(), hierarchy.level_ids(), self.text(texts))
            found = [paint(self.flow.flux, self.flow.vae, each, pooled, regions, height, width, seeds, settings.steps,
                           settings.guidance)
                     for each in (written, truth)]
        return torch.cat([source[0], *found, target[0]], 3)

    def export(self, step: int) -> None:
        write_editor(self.config, self.identity, self.decoder, step)


def run(config: Config) -> bool:
    return launch(EditorStage, config)
