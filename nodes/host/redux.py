"""Core's style models (Redux) at work, and the vision towers that they read."""

from __future__ import annotations

import math
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...kernels.redux import square
from .memory import to_intermediate
from .running import IMAGES_AT_ONCE

SIGLIP = "load sigclip_vision_patch14_384 (for FLUX.1 Redux) or SigLIP2 so400m patch16 512 (for Flex Redux) in Load CLIP Vision."


@torch.no_grad()
def encode(style_model: Any, clip_vision: Any, image: Tensor) -> Tensor:
    """IMAGE [B, H, W, 3 or 4] in 0..1, over white -> the style model's grid of tokens [B, g * g, D] float32.

    The tower's own mean and deviation are applied by core. ValueError for a tower or a style model of another kind.
    """
    side, size, width = _sight(clip_vision)
    _check_width(style_model, width)
    chunks = image.split(IMAGES_AT_ONCE)
    progress = comfy.utils.ProgressBar(len(chunks))
    parts = []
    for chunk in chunks:
        comfy.model_management.throw_exception_if_processing_interrupted()
        parts.append(project(style_model, clip_vision.encode_image(square(chunk, side, size), crop=False)))
        progress.update(1)
    return torch.cat(parts)


@torch.no_grad()
def project(style_model: Any, seen: Any) -> Tensor:
    """What core's CLIP Vision Encode gives -> the style model's tokens [B, N, D] float32. ValueError where they do not fit."""
    _check_width(style_model, seen.last_hidden_state.shape[-1])
    return to_intermediate(style_model.get_cond(seen))


def _sight(clip_vision: Any) -> tuple[int, int, int]:
    """(pixels of a side that patches cover, pixels of a side that core takes, width of a patch's features).

    A tower of any size and aspect (SigLIP2 NaFlex, whose image_size is -1) gets the square of as many patches as it has
    positions.
    """
    network = getattr(clip_vision.model, "vision_model", None)
    if network is None:
        raise ValueError(f"This CLIP vision model ({type(clip_vision.model).__name__}) is no SigLIP, which Redux reads: {SIGLIP}")
    embeddings = network.embeddings
    patch = getattr(embeddings, "patch_size", None) or embeddings.patch_embedding.stride[0]
    positions, width = embeddings.position_embedding.weight.shape
    side = math.isqrt(positions) * patch
    return side, max(clip_vision.image_size, side), width


def _check_width(style_model: Any, width: int) -> None:
    wanted = getattr(style_model.model, "redux_dim", None)
    if wanted is None:
        raise ValueError(
            f"This style model ({type(style_model.model).__name__}) is no Redux: load flux1-redux-dev or Flex Redux in Load Style Model."
        )
    if width != wanted:
        raise ValueError(f"This CLIP vision model gives tokens of width {width} and the style model reads {wanted}: {SIGLIP}")
