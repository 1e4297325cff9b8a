"""Stage 5: the miniature's edit decoder on random instructions, with the adapter's embedding of the edited scene as target."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ...kernels import checkpoint
from ...kernels.adapter import Adapter, AdapterConfig
from ...kernels.edit_decoder import EditDecoder, T5EditDecoder, T5EditDecoderConfig
from ..adapter import named_hierarchy
from ..config import RunConfig
from ..editor import EditorTraining, editor_loss
from ..engine import Step, compile_blocks, launch
from .captions import Edit, edit
from .latents import file_hash
from .scenes import generator as generator_of
from .scenes import render, scene
from .text import encode, load_text_encoder, token_ids
from .towers import read_tower
from .vae import to_tensor


@dataclass(frozen=True)
class Config:
    run: RunConfig
    text: Path
    adapter: Path
    towers: tuple[Path, ...]
    """Files of the adapter's vision towers."""
    export: Path
    presets: tuple[str, ...] = ("tree128", "tree128", "tree64", "global32")
    width: int = 192
    heads: int = 4
    layers: int = 4
    scenes: int = 200_000
    objective: EditorTraining = field(default_factory=EditorTraining)


def load_adapter(path: Path, device: torch.device) -> tuple[Adapter, dict]:
    """A frozen adapter in float32, and its record."""
    state, record = checkpoint.load(path, "adapter")
    adapter = Adapter(AdapterConfig.from_json(record["config"]))
    adapter.load_state_dict({k: v.float() for k, v in state.items()})
    return adapter.to(device).eval().requires_grad_(False), record


def change_of(split: str, index: int, seed: int = 0, operation: str | None = None) -> Edit:
    """Instruction number `index` of a split: half of the places are words, half are coordinates."""
    rng = generator_of(split, index, purpose=31, seed=seed)
    return edit(scene(split, index, seed), rng, operation, fine=rng.random() < 0.5)


class EditorStage:
    name = "editor"

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.text = load_text_encoder(config.text, device)
        self.adapter, self.record = load_adapter(config.adapter, device)
        self.towers = {t.config.id: t for t in (read_tower(p, device) for p in config.towers)}
        dim = self.adapter.config.out_dim
        self.trainables = nn.ModuleDict({"decoder": T5EditDecoder(T5EditDecoderConfig(
            dim, dim, self.adapter.config.hierarchy, config.width, config.heads, config.layers))}).to(device)
        tokens = torch.cat([self.embed([change_of("train", i).source for i in range(n, n + 32)], "tree128")
                            for n in range(0, 256, 32)])
        self.decoder.set_token_statistics(tokens.mean((0, 1)), tokens.std((0, 1)))
        self.frozen = {"text": self.text, "adapter": self.adapter, **self.towers}
        self.identity = {"text": file_hash(config.text), "adapter": file_hash(config.adapter),
                         "towers": [file_hash(p) for p in config.towers]}
        if config.run.compile:
            compile_blocks(self.adapter.layers, self.decoder.stack.block)

    @property
    def decoder(self) -> EditDecoder:
        return self.trainables["decoder"]

    @torch.no_grad()
    def embed(self, scenes, preset: str) -> Tensor:
        """[B, T, D] float32: the adapter's tokens of rendered scenes."""
        x = (to_tensor([render(s) for s in scenes]).to(self.device) + 1) / 2
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bf16"):
            return self.adapter({k: t(x) for k, t in self.towers.items()}, named_hierarchy(preset))[0]

    def losses(self, changes: list[Edit], preset: str, step: Step):
        both = self.embed([c.source for c in changes] + [c.target for c in changes], preset)
        source, target = both.chunk(2)
        with torch.no_grad():
            instruction, _ = encode(self.text, token_ids([c.instruction for c in changes], self.device))
        hierarchy = named_hierarchy(preset)
        return editor_loss(self.decoder, source, target, hierarchy.boxes(), hierarchy.level_ids(), instruction,
                           self.config.objective, step)

    def loss(self, step: Step):
        config = self.config
        index = (step.rand() * config.scenes).long().tolist()
        preset = config.presets[int(torch.randint(len(config.presets), (), generator=step.shared()))]
        return self.losses([change_of("train", i) for i in index], preset, step)

    def scales(self, step: int) -> dict[str, float]:
        return {}

    def validate(self) -> dict[str, float]:
        changes = [change_of("validation", i) for i in range(96)]
        count = len(changes)
        _, parts = self.losses(changes, "tree128", Step(0, 1, 0, "validation", self.device, range(count), count))
        return {k: float(v) for k, v in parts.items()}

    def export(self, step: int) -> None:
        checkpoint.save(self.config.export, self.decoder.state_dict(), kind="edit_decoder", dtype=torch.int8, step=step,
                        config=self.decoder.config.to_json(), hierarchy=list(self.decoder.config.hierarchy),
                        base_sha256=self.record["base_sha256"], adapter_sha256=file_hash(self.config.adapter),
                        licence="Apache-2.0")


def run(config: Config) -> bool:
    return launch(EditorStage, config)
