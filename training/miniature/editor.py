"""Stage 5: the miniature's edit decoder, from random instructions to the adapter's embedding of the edited scene.

The shipped decoder is T5's. Stage `editor-llm` trains a small causal LLM on the same samples, for comparison.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...kernels import checkpoint
from ...kernels.edit_decoder import (
    EditDecoder,
    EditDecoderConfig,
    LLMEditDecoderConfig,
    T5EditDecoderConfig,
    build_edit_decoder,
)
from ...kernels.precision import autocast
from ..config import RunConfig
from ..engine import Ahead, Step, compile_blocks, launch
from ..files import file_hash
from ..objectives.augmentation import Augmentation
from ..objectives.edit import EditorTraining, editor_loss, load_editor
from ..objectives.reconstruct import load_adapter, named_hierarchy
from .base import inverse_instruction
from .captions import Edit, edit
from .drawing import codes, draw
from .scenes import COLOURS, SHAPES, Scene, choice, scene
from .scenes import generator as generator_of
from .stored import Scenes, training_scenes
from .text import encode, load_text_encoder, token_ids
from .towers import read_tower

VALIDATED = 96  # number of edits of a validation
MEASURED = 256  # scenes over which the statistics of the adapter's tokens are taken


@dataclass(frozen=True)
class Config:
    run: RunConfig
    text: Path
    adapter: Path
    towers: tuple[Path, ...]
    """Files of the adapter's vision towers."""
    export: Path
    cache: Path
    """Folder of what is made once of the training scenes."""
    start: Path | None = None
    """An exported edit decoder of the same sizes to go on from; None: a new one."""
    presets: tuple[str, ...] = ("tree128", "tree128", "tree64", "global32")
    stack: str = "t5"
    """t5, or the type of a causal LLM as transformers calls it (qwen3)."""
    width: int = 192
    heads: int = 4
    layers: int = 4
    feed_forward: int = 416
    """Inner width of the feed-forward layers of an LLM. T5's is 2.5 times its width."""
    scenes: int = 160_000
    twins: float = 0.0
    """Share of the samples in which another thing shares the colour or the shape of the one that is named."""
    chained: float = 0.0
    """Share of the samples whose source is what the decoder itself wrote for an edit before, not the adapter's
    embedding: so that several edits in a row do not drift."""
    objective: EditorTraining = field(default_factory=EditorTraining)
    augmentation: Augmentation = field(default_factory=Augmentation)

    def decoder(self, dim: int, hierarchy: tuple) -> EditDecoderConfig:
        """The decoder over embeddings and instructions of width `dim`."""
        if self.stack == "t5":
            return T5EditDecoderConfig(dim, dim, hierarchy, self.width, self.heads, self.layers)
        return LLMEditDecoderConfig(dim, dim, hierarchy, {
            "model_type": self.stack, "hidden_size": self.width, "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "head_dim": self.width // self.heads, "num_hidden_layers": self.layers,
            "intermediate_size": self.feed_forward})


def change_of(split: str, index: int, seed: int = 0, operation: str | None = None) -> Edit:
    """Instruction number `index` of a split."""
    return random_edit(scene(split, index, seed), generator_of(split, index, purpose=31, seed=seed), operation)


def random_edit(truth: Scene, rng: np.random.Generator, operation: str | None = None) -> Edit:
    """An instruction on the scene: half of the places are words, half are coordinates."""
    return edit(truth, rng, operation, fine=rng.random() < 0.5)


def augmented(change: Edit, kind: str, rng: np.random.Generator) -> Edit:
    """The edit as it is ("plain"), reversed ("reversed": from its target back, by coordinates) or without an effect
    ("identity": no instruction, or one for what is already so)."""
    if kind == "reversed":
        return replace(change, instruction=inverse_instruction(change, fine=True), source=change.target,
                       target=change.source,
                       subject=change.result, result=change.subject)
    if kind == "identity":
        return Edit(kind, nothing_to_do(change, rng), change.source, change.source, None, None)
    return change


def nothing_to_do(change: Edit, rng: np.random.Generator) -> str:
    """An instruction that leaves the source scene of the edit as it is."""
    thing, names = choice(rng, change.source.things), {t.name for t in change.source.things}
    absent = choice(rng, [name for c in COLOURS for s in SHAPES if (name := f"{c} {s}") not in names])
    return choice(rng, ["", f"make the {thing.name} {thing.colour}", f"remove the {absent}"])


def shares(change: Edit, kind: str) -> bool:
    """Whether another thing of the source scene shares the subject's `kind`, colour or shape."""
    subject = change.subject
    return subject is not None and any(t != subject and getattr(t, kind) == getattr(subject, kind)
                                       for t in change.source.things)


def has_twin(change: Edit) -> bool:
    return shares(change, "colour") or shares(change, "shape")


def with_twins(scenes: Scenes) -> np.ndarray:
    """The numbers of the scenes in which two things share a colour or a shape."""
    kinds, present = scenes.things[..., :2], scenes.things[..., 5] > 0
    pairs = np.triu(np.ones((present.shape[1],) * 2, bool), 1) & present[:, :, None] & present[:, None]
    return np.flatnonzero(((kinds[:, :, None] == kinds[:, None]).any(-1) & pairs).any((1, 2)))


def twin_edit(truth: Scene, rng: np.random.Generator, tries: int = 8) -> Edit:
    """An edit of the scene whose subject has a twin, where one is found in a few tries."""
    for _ in range(tries):
        change = random_edit(truth, rng)
        if has_twin(change):
            break
    return change


def samples(first: list[Edit], changes: list[Edit]) -> dict[str, Tensor]:
    """The codes of the scenes of edits (before, source, target: [3 B] in this order) and the ids of their instructions
    ([2 B]: of `first`, from "before" to "source", then of `changes`)."""
    scenes = [c.source for c in first] + [c.source for c in changes] + [c.target for c in changes]
    return {"ids": token_ids([c.instruction for c in (*first, *changes)]), **codes(scenes)}


def prepare(config: Config, scenes: Scenes, twins: np.ndarray, step: Step) -> dict[str, Tensor]:
    """The edits of a step. The first `chained` of the global batch follow another edit; the others are twice the
    same. twins: with_twins(scenes)."""
    first, changes = [], []
    for position, (where, kind, twin) in zip(step.positions, step.rand(3).tolist()):
        rng = np.random.default_rng([step.seed, 31, step.number, position])
        if twin < config.twins and len(twins):
            change = twin_edit(scenes[twins[int(where * len(twins))]], rng)
        else:
            change = random_edit(scenes[int(where * len(scenes))], rng)
        if position < config.chained * step.batch:
            first.append(change)
            changes.append(random_edit(change.target, rng))
        else:
            changes.append(augmented(change, config.augmentation.kind(kind), rng))
            first.append(changes[-1])
    return samples(first, changes)


class EditorStage:
    name = "editor"

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.text = load_text_encoder(config.text, device)
        self.adapter, self.record = load_adapter(config.adapter, device)
        self.towers = {t.config.id: t for t in (read_tower(p, device) for p in config.towers)}
        dim = self.adapter.config.out_dim
        decoder = build_edit_decoder(config.decoder(dim, self.adapter.config.hierarchy))
        if config.start:
            decoder.load_state_dict(load_editor(config.start, torch.device("cpu"))[0].state_dict())
        self.trainables = nn.ModuleDict({"decoder": decoder}).to(device)
        known = codes([change_of("train", i).source for i in range(MEASURED)])
        tokens = self.embed(*(known[name].to(device) for name in ("things", "grounds")), "tree128")
        scenes = training_scenes(config.scenes, 0, config.cache, device)
        self.ahead = Ahead(partial(prepare, config, scenes, with_twins(scenes)), device, config.run.workers)
        self.decoder.set_token_statistics(tokens.mean((0, 1)), tokens.std((0, 1)))
        self.frozen = {"text": self.text, "adapter": self.adapter, **self.towers}
        self.identity = {"text": file_hash(config.text), "adapter": file_hash(config.adapter),
                         "towers": {name: file_hash(path) for name, path in zip(self.towers, config.towers)},
                         **({"start": file_hash(config.start)} if config.start else {})}
        if config.run.compile:
            compile_blocks(self.adapter.layers, self.decoder.blocks)

    @property
    def decoder(self) -> EditDecoder:
        return self.trainables["decoder"]

    @torch.no_grad()
    def embed(self, things: Tensor, grounds: Tensor, preset: str) -> Tensor:
        """[B, T, D] float32: the adapter's tokens of scenes drawn from their codes."""
        x = (draw(things, grounds) + 1) / 2
        with autocast(self.device, self.config.run.precision):
            return self.adapter({k: t(x) for k, t in self.towers.items()}, named_hierarchy(preset))[0]

    def losses(self, made: dict[str, Tensor], preset: str, step: Step, chained: int = 0):
        """chained: how many of the first samples start from what the decoder itself writes."""
        hierarchy, count = named_hierarchy(preset), len(made["grounds"]) // 3
        keep = [*range(chained), *range(count, 3 * count)]
        tokens = self.embed(made["things"][keep], made["grounds"][keep], preset)
        before, source, target = tokens.split([chained, count, count])
        with torch.no_grad():
            words, _ = encode(self.text, torch.cat([made["ids"][:chained], made["ids"][count:]]))
            boxes, levels = hierarchy.boxes(), hierarchy.level_ids()
            if chained:
                written = self.decoder(before, boxes, levels, words[:chained]).float()
                source = torch.cat([written, source[chained:]])
        return editor_loss(self.decoder, source, target, boxes, levels, words[chained:], self.config.objective, step)

    def loss(self, step: Step):
        config = self.config
        preset = config.presets[int(torch.randint(len(config.presets), (), generator=step.shared()))]
        chained = sum(position < config.chained * step.batch for position in step.positions)
        return self.losses(self.ahead(step), preset, step, chained)

    def scales(self, step: int) -> dict[str, float]:
        return {}

    def validate(self) -> dict[str, float]:
        changes = [change_of("validation", i) for i in range(VALIDATED)]
        held = {name: each.to(self.device) for name, each in samples(changes, changes).items()}
        step = Step(0, 1, 0, "validation", self.device, range(VALIDATED), VALIDATED)
        _, parts = self.losses(held, "tree128", step)
        return {k: float(v) for k, v in parts.items()}

    def export(self, step: int) -> None:
        checkpoint.save(self.config.export, self.decoder.state_dict(), kind="edit_decoder", dtype=torch.int8, step=step,
                        config=self.decoder.config.to_json(), hierarchy=list(self.decoder.config.hierarchy),
                        base_sha256=self.record["base_sha256"], adapter_sha256=file_hash(self.config.adapter),
                        licence="Apache-2.0")


def run(config: Config) -> bool:
    return launch(EditorStage, config)
