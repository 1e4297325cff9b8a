"""Networks of ours at work: an image encoded, an embedding built, an embedding edited."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...kernels.adapter import AdapterConfig
from ...kernels.embedding import SemanticEmbedding, from_hierarchy
from ...kernels.hierarchy import hierarchy
from ...kernels.picture import over_white
from .memory import Network, to_intermediate

IMAGES_AT_ONCE = 4


@torch.no_grad()
def encode_image(vision: tuple[Network, ...], image: Tensor) -> dict[str, Tensor]:
    """IMAGE [B, H, W, 3 or 4] in 0..1, over white -> tower id -> patch features [B, N, C] float32."""
    pixels = over_white(image).movedim(-1, 1)
    chunks = pixels.split(IMAGES_AT_ONCE)
    progress = comfy.utils.ProgressBar(len(vision) * len(chunks))
    features = {}
    for tower in vision:
        device, _ = tower.ready()
        parts = []
        for chunk in chunks:
            comfy.model_management.throw_exception_if_processing_interrupted()
            parts.append(to_intermediate(tower.module(chunk.to(device))))
            progress.update(1)
        features[tower.module.config.id] = torch.cat(parts)
    return features


@torch.no_grad()
def build_embedding(adapter: Network, features: dict[str, Tensor], preset: str | None) -> SemanticEmbedding:
    """Patch features -> embedding. `preset`: the active part of the adapter's hierarchy, None for all of it."""
    config = adapter.module.config
    _check_features(adapter.name, config, features)
    active = adapter.module.table if preset is None else hierarchy(preset)
    active.index_in(adapter.module.table)  # refuses before the network is moved
    device, dtype = adapter.ready()
    wanted = {tower.id: features[tower.id].to(device, dtype) for tower in config.towers}
    tokens, pooled = adapter.module(wanted, active)
    widths = adapter.record.get("widths", {})
    source = {"adapter": adapter.name, "preset": preset or "full"}
    if "pooled" in widths:
        source["pooled_width"] = widths["pooled"]
    pooled = None if pooled is None else to_intermediate(pooled)
    return from_hierarchy(to_intermediate(tokens), active, pooled, source)


@torch.no_grad()
def edit_embedding(
    decoder: Network, embedding: SemanticEmbedding, clip: Any, instruction: str, mode: str
) -> SemanticEmbedding:
    """The embedding after an instruction that is read by the model's own text encoder."""
    decoder.module.check_mode(mode)
    config = decoder.module.config
    if embedding.width != config.dim:
        raise ValueError(
            f"{decoder.name} edits embeddings of width {config.dim} and this one has {embedding.width}: "
            "use the edit decoder that belongs to the adapter."
        )
    fitted = bool(decoder.record.get("fitted"))
    if ("fit" if fitted else "adapter") not in embedding.source:
        raise ValueError(
            f"{decoder.name} edits embeddings that were fitted, and this one was not: fit the image with Fit Embedding and "
            "edit that."
            if fitted
            else f"{decoder.name} edits what one adapter makes, and this embedding does not come from one adapter alone: "
            "encode an image with Build Hierarchical Embedding and edit that."
        )
    text = clip.encode_from_tokens(clip.tokenize(instruction))
    if text.shape[-1] != config.text_dim:
        raise ValueError(
            f"This CLIP gives text of width {text.shape[-1]} and {decoder.name} reads {config.text_dim}: "
            "connect the CLIP of the Flux model (its T5)."
        )
    device, dtype = decoder.ready()
    steps = embedding.token_count if mode == "autoregressive" else 1
    progress = comfy.utils.ProgressBar(steps)
    tokens = decoder.module.generate(
        embedding.tokens.to(device, dtype),
        embedding.boxes,
        embedding.levels,
        text.to(device, dtype).expand(embedding.batch, -1, -1),
        mode=mode,
        progress=lambda done, total: _report(progress, done, total),
    )
    edits = [*embedding.source.get("edits", ()), instruction]
    return replace(embedding, tokens=to_intermediate(tokens), source={**embedding.source, "edits": edits})


def _report(progress, done: int, total: int) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()
    progress.update_absolute(done, total)


def _check_features(name: str, config: AdapterConfig, features: dict[str, Tensor]) -> None:
    for tower in config.towers:
        if tower.id not in features:
            raise ValueError(
                f"{name} was trained with the vision encoder {tower.id!r} and the features come from "
                f"{', '.join(map(repr, features))}: load {tower.id!r} in Load Vision Encoders."
            )
        rows, cols = tower.grid
        if features[tower.id].shape[1:] != (rows * cols, tower.width):
            raise ValueError(
                f"{name} expects {rows}x{cols} patches of width {tower.width} from {tower.id!r} and got "
                f"{list(features[tower.id].shape[1:])}: load the very file that it was trained with."
            )
