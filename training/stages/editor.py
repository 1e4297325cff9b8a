"""`sda train editor`: the edit decoder on prepared edits, towards a frozen adapter's embedding of the edited picture."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...kernels import checkpoint
from ...kernels.hierarchy import Hierarchy
from ..adapter import load_adapter, named_hierarchy, regions_for
from ..base import base_sha256, load_flux
from ..config import RunConfig
from ..data.ahead import Ahead
from ..data.batches import Plan
from ..data.decode import CorruptSample, decode_edit
from ..data.index import Index
from ..edit_augmentation import Augmentation, turned
from ..edit_flow import EditFlow, FlowTraining
from ..editor import EditorTraining, editor_loss
from ..encoders import load_towers, load_vae
from ..engine import Step, compile_blocks, launch
from ..files import file_hash, weights_hash
from ..instructions import load_instruction_encoder
from ..lora import Learned, merged_state
from ..sampling import paint
from .editor_config import Base, Decoder, Edits, Text, Vision, check, held_out, new_decoder

SHOWN = 4  # held-out edits that are painted at every validation
SPARES = 10  # corrupt samples in a row at one position before a run that skips them gives up


@dataclass(frozen=True)
class Config:
    run: RunConfig
    data: Edits
    adapter: Path
    """The adapter's file: what it makes of the edited picture is what the decoder learns to write."""
    vision: Vision
    text: Text
    export: Path
    """The file that the nodes load."""
    presets: tuple[str, ...] = ("tree128", "tree128", "tree64", "global32")
    """Each batch takes one of them at random; the first is also what is validated."""
    licence: str = "Apache-2.0"
    """What the file says of its licence."""
    decoder: Decoder = field(default_factory=Decoder)
    objective: EditorTraining = field(default_factory=EditorTraining)
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(identity=0.05, reversed=0.15))
    flow: FlowTraining = field(default_factory=FlowTraining)
    base: Base = field(default_factory=Base)
    """Flux itself, for `flow` alone."""


class EditorStage:
    name = "editor"

    def __init__(self, config: Config, device: torch.device):
        check(config)
        self.config, self.device = config, device
        self.index, self.kept = held_out(Index.read(config.data.index), config.data.validation)
        self.plan = Plan(self.index, config.run.batch, config.run.seed, config.data.resolutions)
        self.ahead = Ahead(self.read, config.data.threads)
        self.adapter, self.record = load_adapter(config.adapter, device)
        half = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.towers = load_towers(config.vision.files, config.vision.ids, device, half)
        self.text = load_instruction_encoder(config.text.path, device, config.text.tokenizer, config.text.length, config.text.precision)
        self.decoder = new_decoder(config.decoder, self.adapter.config, self.text.width, half).to(device).train()
        if config.decoder.start is None:
            self.decoder.set_token_statistics(*self.statistics())
        self.trainables = nn.ModuleDict({"decoder": Learned(self.decoder)})
        self.frozen = {"adapter": self.adapter, **self.towers, "text": self.text.model}
        if config.decoder.architecture == "causal_lm" and config.decoder.lora_rank:
            self.frozen["llm"] = self.decoder.llm
        self.identity = {"plan": self.plan.hash, "adapter": file_hash(config.adapter), "text": self.text.hash,
                         "towers": [weights_hash(p) for p in config.vision.files]}
        if begun := config.decoder.llm or config.decoder.start:
            self.identity["begun_from"] = weights_hash(begun)
        self.flow = self.through_flux() if config.flow.weight else None
        if config.run.compile:
            compile_blocks(self.adapter.layers, self.decoder.blocks)

    def through_flux(self) -> EditFlow:
        config = self.config
        digest = base_sha256(config.base.path)
        if digest != self.record["base_sha256"]:
            raise ValueError(f"{config.adapter} was trained through another base than {config.base.path}; give that base.")
        self.identity["base"] = digest
        flux = load_flux(config.base.path, config.base.precision, self.device)
        if config.run.compile:
            compile_blocks(flux.transformer_blocks, flux.single_transformer_blocks)
        self.frozen["flux"] = flux
        return EditFlow(flux, load_vae(config.base.vae, self.device), config.flow, self.record["masked"])

    def read(self, number: int, position: int) -> tuple[Tensor, Tensor, str]:
        """(source, target, instruction) at a position of a step's batch; where it is corrupt, another of its bucket in its
        place if so configured."""
        _, bucket, rows = self.plan.at(self.name, number)
        try:
            return decode_edit(self.index, rows[position], bucket)
        except CorruptSample as error:
            if self.config.data.on_corrupt == "stop":
                raise
            print(f"{error} Another sample takes its place.", flush=True)
        for attempt in range(SPARES):
            try:
                return decode_edit(self.index, self.plan.spare(self.name, number, position, attempt), bucket)
            except CorruptSample as error:
                last = error
        raise last

    def describe(self, step: Step) -> list[str]:
        rows = self.plan.at(self.name, step.number)[2]
        return [self.index[rows[position]]["key"] for position in step.positions]

    def report(self) -> str:
        return f"{self.plan.report()}\n{len(self.kept)} samples are held out for validation"

    @torch.no_grad()
    def statistics(self, batches: int = 8) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the adapter's tokens over the source pictures of the first batches."""
        tokens = []
        for number in range(batches):
            sources = torch.stack([self.read(number, p)[0] for p in range(min(32, self.config.run.batch))])
            tokens.append(self.embed(sources.to(self.device), named_hierarchy(self.config.presets[0]))[0].flatten(0, 1))
        tokens = torch.cat(tokens)
        return tokens.mean(0), tokens.std(0)

    @torch.no_grad()
    def embed(self, images: Tensor, hierarchy: Hierarchy) -> tuple[Tensor, Tensor | None]:
        """(tokens [B, T, D] float32, pooled [B, P] or None) of pictures [B, 3, H, W] in [0, 1]."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bf16"):
            return self.adapter({name: tower(images) for name, tower in self.towers.items()}, hierarchy)

    def losses(self, source: Tensor, target: Tensor, texts: list[str], preset: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        hierarchy, count = named_hierarchy(preset), len(texts)
        source, target = source.to(self.device), target.to(self.device)
        tokens, pooled = self.embed(torch.cat([source, target]), hierarchy)
        flow = None
        if self.flow is not None:
            own = None if pooled is None else pooled[:count]  # an edit keeps the pooled vector of its source
            flow = lambda written: self.flow.loss(written, own, hierarchy, source, target, step)  # noqa: E731
        return editor_loss(self.decoder, *tokens.chunk(2), hierarchy.boxes(), hierarchy.level_ids(), self.text(texts),
                           self.config.objective, step, flow, self.config.flow.weight)

    def loss(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        samples = [turned(sample, *draws, self.config.augmentation)
                   for sample, draws in zip(self.ahead(step.number, step.positions), step.rand(2).tolist())]
        presets = self.config.presets
        preset = presets[int(torch.randint(len(presets), (), generator=step.shared()))]
        source, target, texts = zip(*samples)
        return self.losses(torch.stack(source), torch.stack(target), list(texts), preset, step)

    def scales(self, step: int) -> dict[str, float]:
        return {}

    def validation_batches(self, size: int):
        """(sources, targets, instructions) of the held-out samples, bucket by bucket, each batch with its number of draws."""
        resolution = self.config.data.resolutions[0]
        buckets = self.kept.buckets(resolution)
        for bucket in np.unique(buckets[buckets.all(1)], axis=0).tolist():
            rows = np.flatnonzero((buckets == bucket).all(1)).tolist()
            for first in range(0, len(rows), size):
                samples = [decode_edit(self.kept, row, tuple(bucket)) for row in rows[first:first + size]]
                source, target, texts = zip(*samples)
                yield torch.stack(source), torch.stack(target), list(texts)

    def validate(self) -> dict[str, float]:
        """The parts of the loss over the held-out samples, with the same noise and times at every validation."""
        sums, seen = {}, 0
        self.decoder.eval()
        for number, (source, target, texts) in enumerate(self.validation_batches(self.config.run.micro or self.config.run.batch)):
            count = len(texts)
            step = Step(number, 1, 0, "validation", self.device, range(count), count)
            _, parts = self.losses(source, target, texts, self.config.presets[0], step)
            sums = {name: sums.get(name, 0.0) + count * float(value) for name, value in parts.items()}
            seen += count
        self.decoder.train()
        return {name: value / seen for name, value in sums.items()}

    @torch.no_grad()
    def pictures(self) -> dict[str, np.ndarray]:
        """Held-out edits, one a row: source, what the written embedding paints, what the true one paints, target."""
        if self.flow is None or not len(self.kept):
            return {}
        source, target, texts = next(self.validation_batches(SHOWN))
        source, target = source.to(self.device), target.to(self.device)
        hierarchy = named_hierarchy(self.config.presets[0])
        (tokens, truth), pooled = self.embed(torch.cat([source, target]), hierarchy)[0].chunk(2), self.embed(source, hierarchy)[1]
        written = self.decoder.generate(tokens, hierarchy.boxes(), hierarchy.level_ids(), self.text(texts))
        height, width = source.shape[-2:]
        side = 2 * self.flow.vae.downsample
        regions = regions_for(hierarchy, (height // side, width // side), self.device) if self.flow.masked else None
        painted = [paint(self.flow.flux, self.flow.vae, t, pooled, regions, height, width) for t in (written, truth)]
        rows = torch.cat([source, *painted, target], 3).permute(0, 2, 3, 1).flatten(0, 1)
        return {"edits": (rows * 255).round().byte().cpu().numpy()}

    def export(self, step: int) -> None:
        config, decoder = self.config, self.decoder
        checkpoint.save(config.export, merged_state(decoder), kind="edit_decoder", dtype=torch.bfloat16, step=step,
                        config=decoder.config.to_json(), hierarchy=list(decoder.config.hierarchy),
                        base_sha256=self.record["base_sha256"], adapter_sha256=self.identity["adapter"],
                        text_encoder_sha256=self.text.hash, licence=config.licence)


def run(config: Config) -> bool:
    return launch(EditorStage, config)
