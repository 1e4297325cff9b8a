"""Pairs for an edit decoder without an adapter: scenes and their edits as embeddings fitted through the frozen Flux.

A source is fitted from the text space's start, the same for all, with the same noise and times: so a token's place means
the same in every embedding. An edited picture goes on from its source's fit for fewer steps: what the edit leaves alone
then stays where it is. Of the adapter's file only the text encoder's mean and deviation are read.

A finished part is a whole safetensors file, and the same line goes on with the others:

tokens        [N, T, D] float16, sources and edited pictures
pairs         [P, 2] int32: from which of the tokens to which
instructions  in the metadata, a JSON list of P texts. The inverse of an edit is a pair of its own.
"""
from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...kernels.embedding import from_hierarchy
from ...kernels.fit import Fit, FitSettings
from ...kernels.precision import autocast
from ...kernels.replace import replacing
from ...kernels.text_space import TextSpace
from ..config import Count, Positive, Whole
from ..engine import pick_device
from ..files import file_hash
from ..frozen.flux import velocity
from ..frozen.region_attention import attend_by_region
from ..frozen.text_statistics import text_statistics
from ..objectives.reconstruct import named_hierarchy, regions_for
from .base import inverse_instruction, load_base
from .captions import OPERATIONS, Edit
from .editor import change_of
from .scenes import render
from .vae import load_vae, to_tensor


@dataclass(frozen=True)
class Config:
    flux: Path
    text: Path
    """The text encoder's file; only its hash is read."""
    vae: Path
    statistics: Path
    """A file with the text encoder's mean and deviation, such as an exported adapter's."""
    out: Path
    """Folder of the parts."""
    sources: Count = 400
    """Training scenes."""
    edits: Count = 3
    """Edits of every scene, of different operations where they find room."""
    part: Count = 16
    """Scenes of a file. They are fitted at once."""
    preset: str = "tree64"
    steps: Count = 100
    rate: Positive = 0.2
    edited_steps: Count = 60
    """Steps by which an edited picture goes on from its source's fit."""
    edited_rate: Positive = 0.15
    seed: int = 0
    """Seed of the noise and of the times."""
    first: Whole = 0
    """Number of the first part that this process makes; it makes every `stride`-th."""
    stride: Count = 1
    precision: Literal["bf16", "fp32"] = "fp32"
    device: str = "auto"


def edits_of(index: int, count: int, split: str = "train") -> list[Edit]:
    """`count` edits of a scene, by different operations; fewer where they find no room."""
    operations = [OPERATIONS[(index + k) % len(OPERATIONS)] for k in range(len(OPERATIONS))]
    found = (change_of(split, index, 0, op) for op in operations)
    return [change for op, change in zip(operations, found) if change.operation == op][:count]


class Fitter:
    """The frozen parts, and fits of batches of pictures."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.flux, _, record = load_base(config.flux, config.text, device)
        self.vae = load_vae(config.vae, device)
        self.mu = record["config"]["sampling_shift_mu"]
        self.space = TextSpace(*text_statistics(config.statistics, []))
        self.hierarchy = named_hierarchy(config.preset)
        self.attention = attend_by_region(self.flux)

    def fit(self, pictures: list[np.ndarray], start: Tensor | None = None) -> Tensor:
        """Tokens [B, T, D] float32 on the CPU fitted to pictures; start: the tokens to go on from, None: the shared
        start."""
        config = self.config
        own = self.space.start(self.hierarchy, len(pictures))
        steps, rate = config.steps, config.rate
        if start is not None:
            own, steps, rate = from_hierarchy(start, self.hierarchy), config.edited_steps, config.edited_rate
        with torch.no_grad(), autocast(self.device, config.precision):
            x = to_tensor(pictures).to(self.device, memory_format=torch.channels_last)
            latents = self.vae.encode(x).latent_dist.mean.float().contiguous()
        self.attention.regions = regions_for(self.hierarchy, tuple(n // 2 for n in latents.shape[-2:]), self.device)

        def flow(x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor | None) -> Tensor:
            none = tokens.new_zeros(len(tokens), self.flux.config.pooled_projection_dim)
            with autocast(self.device, config.precision):
                return velocity(self.flux, x, t, tokens, none).float()

        fit = Fit(own.to(self.device), self.space, FitSettings(steps, rate, shift=self.mu, seed=config.seed))
        while not fit.done:
            fit.step(latents, flow)
        return fit.tokens()[0].cpu()

    def part(self, number: int) -> tuple[dict[str, Tensor], list[str]]:
        """(tensors, instructions) of a part."""
        config = self.config
        indices = range(number * config.part, min(config.sources, (number + 1) * config.part))
        changes = [(row, change) for row, index in enumerate(indices) for change in edits_of(index, config.edits)]
        sources = self.fit([render(change_of("train", index).source) for index in indices])
        made = [sources]
        for first in range(0, len(changes), config.part):
            some = changes[first:first + config.part]
            made.append(self.fit([render(change.target) for _, change in some], sources[[row for row, _ in some]]))
        pairs, instructions = [], []
        for place, (row, change) in enumerate(changes, len(sources)):
            pairs += [(row, place), (place, row)]
            instructions += [change.instruction, inverse_instruction(change, fine=True)]
        return {"tokens": torch.cat(made).half(), "pairs": torch.tensor(pairs, dtype=torch.int32)}, instructions


def identity_of(config: Config) -> dict:
    """All that decides the numbers of the parts."""
    keys = ("sources", "edits", "part", "preset", "steps", "rate", "edited_steps", "edited_rate", "seed",
            "precision")
    return {key: getattr(config, key) for key in keys} | {
        key: file_hash(getattr(config, key)) for key in ("flux", "vae", "statistics")}


def read_part(path: Path) -> tuple[Tensor, Tensor, list[str], dict]:
    """(tokens, pairs, instructions, identity) of a part. ValueError in one sentence for a file that is none."""
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            tokens, pairs = file.get_tensor("tokens"), file.get_tensor("pairs").long()
            instructions, identity = json.loads(said["instructions"]), json.loads(said["identity"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} is no part of fitted pairs: delete it and run `sda miniature fits` again.") from error
    if tokens.ndim != 3 or pairs.shape != (len(instructions), 2) or len(pairs) and not 0 <= pairs.max() < len(tokens):
        raise ValueError(f"The pairs of {path} do not fit its tokens: delete it and run `sda miniature fits` again.")
    return tokens, pairs, instructions, identity


def run(config: Config) -> None:
    device, identity = pick_device(config.device), identity_of(config)
    config.out.mkdir(parents=True, exist_ok=True)
    parts = range(config.first, -(-config.sources // config.part), config.stride)
    fitter, began, made = None, time.monotonic(), 0
    for number in parts:
        path = config.out / f"fits_{number:05d}.safetensors"
        if path.exists():
            if read_part(path)[3] != identity:
                raise ValueError(f"{path} was fitted by other settings or weights: give another folder, or delete it.")
            continue
        fitter = fitter or Fitter(config, device)
        tensors, instructions = fitter.part(number)
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"instructions": json.dumps(instructions), "identity": json.dumps(identity)})
        made += len(tensors["tokens"])
        print(f"part {number} of {parts.stop}: {len(instructions)} pairs, "
              f"{(time.monotonic() - began) / made:.2f} s a picture", flush=True)
