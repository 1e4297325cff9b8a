"""What the fits of `sda invert` begin with: the text space's mean, a caption, an embedding, an adapter's encoding."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...kernels import checkpoint, embedding_file
from ...kernels.embedding import SemanticEmbedding, from_hierarchy
from ...kernels.text_space import TextSpace
from ..data.decode import send
from ..frozen.encoders import load_towers
from ..frozen.text import load_instruction_encoder
from ..objectives.reconstruct import load_adapter, named_hierarchy
from .invert_pictures import Picture
from .invert_settings import Config

CPU = torch.device("cpu")
"""Encoders work here. They take seconds a picture, a fit takes minutes, and the card belongs to the base."""
Start = Callable[[Sequence[Picture]], SemanticEmbedding]
"""Pictures of one bucket -> the embedding [B, T, D] on the CPU that their fit begins with."""


def start_of(config: Config, space: TextSpace) -> Start:
    """Load what `config.start` names. ValueError in one sentence where it does not fit."""
    hierarchy = named_hierarchy(config.preset)
    if config.start == "mean":
        return lambda pictures: space.start(hierarchy, len(pictures))
    if config.start == "caption":
        read = load_instruction_encoder(config.base.text, CPU)
        return lambda pictures: space.start_from(read([p.caption for p in pictures]).float(), hierarchy, len(pictures))
    if checkpoint.read_header(config.start)["kind"] == "embedding":
        return from_embedding(embedding_file.load(config.start)[0])
    return from_adapter(config)


def from_fits(folder: Path, batch: Sequence[Picture]) -> SemanticEmbedding:
    """What the fits of edited pictures begin with: those of their sources, in the output folder."""
    known = [embedding_file.load(folder / picture.begin)[0] for picture in batch]
    pooled = None if known[0].pooled is None else torch.cat([each.pooled for each in known])
    return replace(known[0], tokens=torch.cat([each.tokens for each in known]), pooled=pooled)


def from_embedding(known: SemanticEmbedding) -> Start:
    def start(pictures: Sequence[Picture]) -> SemanticEmbedding:
        count = len(pictures)
        pooled = None if known.pooled is None else known.pooled.expand(count, -1)
        return replace(known, tokens=known.tokens.expand(count, -1, -1), pooled=pooled)

    return start


def from_adapter(config: Config) -> Start:
    adapter, _ = load_adapter(config.start_file, CPU)
    towers = load_towers(config.vision.files, config.vision.ids, CPU, torch.float32)
    hierarchy, source = named_hierarchy(config.preset), {"adapter": config.start_file.name, "preset": config.preset}

    @torch.no_grad()
    def start(pictures: Sequence[Picture]) -> SemanticEmbedding:
        images = send([picture.pixels for picture in pictures], CPU)
        tokens, pooled = adapter({name: tower(images) for name, tower in towers.items()}, hierarchy)
        return from_hierarchy(tokens, hierarchy, pooled, source)

    return start
