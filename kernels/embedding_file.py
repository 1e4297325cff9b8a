"""Embedding files: a semantic embedding in the checkpoint format, kind `embedding`.

Tokens and pooled vector are stored in half precision (128 tokens of width 4096 are 1 MiB), masks in 8 bits, boxes, levels
and strengths as they are. The record holds what the embedding says of its source, its widths and a small JPEG.
"""

from __future__ import annotations

import base64
import os
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .embedding import SemanticEmbedding

KIND = "embedding"
SUFFIX = ".safetensors"
# Files hold finite numbers only; this one stands for a strength of -inf.
_OFF = torch.finfo(torch.float32).min
_ALWAYS = ("tokens", "boxes", "levels", "strengths")
_SOMETIMES = ("pooled", "masks", "masked_by")


def save(
    path: str | os.PathLike,
    embedding: SemanticEmbedding,
    thumbnail: bytes | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write an embedding in one step; on any failure the folder is as it was.

    thumbnail: a JPEG of what the embedding shows, kept in the record. metadata: text for other readers (the workflow).
    Raises ValueError in one sentence if the file cannot be written.
    """
    tensors = {name: getattr(embedding, name) for name in (*_ALWAYS, *_SOMETIMES)}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    tensors |= {name: _half(tensors[name]) for name in ("tokens", "pooled") if name in tensors}
    tensors["strengths"] = embedding.strengths.clamp_min(_OFF)
    if "masks" in tensors:
        tensors["masks"] = (embedding.masks * 255).round().to(torch.uint8)
    pooled = None if embedding.pooled is None else embedding.pooled.shape[-1]
    checkpoint.save(
        path,
        tensors,
        KIND,
        {"batch": embedding.batch, "tokens": embedding.token_count},
        metadata=metadata,
        widths={"text": embedding.width, "pooled": pooled},
        source=embedding.source,
        thumbnail=None if thumbnail is None else base64.b64encode(thumbnail).decode("ascii"),
    )


def check(path: str | os.PathLike) -> None:
    """ValueError in one sentence if this is no whole embedding file that this pack reads. Does not look at the numbers."""
    checkpoint.read_header(path, KIND)


def load(path: str | os.PathLike) -> tuple[SemanticEmbedding, bytes | None]:
    """(embedding with float32 tokens on the CPU, JPEG bytes or None) of an embedding file.

    Raises ValueError in one sentence: truncated, no embedding, newer version, not finite, parts missing or misshapen.
    """
    tensors, record = checkpoint.load(path, KIND)
    for name in _ALWAYS:
        if name not in tensors:
            raise ValueError(f"{path} lacks {name!r}: save the embedding again.")
    if not isinstance(record.get("source"), dict):
        raise ValueError(f"{path} does not say where its embedding came from: save the embedding again.")
    # A copy: what was read is a view of the file, which must stay free to be replaced or deleted.
    parts = {name: tensors[name].clone() for name in (*_ALWAYS, *_SOMETIMES) if name in tensors}
    parts |= {name: parts[name].float() for name in ("tokens", "pooled") if name in parts and parts[name].is_floating_point()}
    parts["strengths"] = torch.where(parts["strengths"] == _OFF, -torch.inf, parts["strengths"])
    if "masks" in parts:
        parts["masks"] = parts["masks"].float() / 255
    return SemanticEmbedding(**parts, source=record["source"]), _decoded(record.get("thumbnail"))


def _half(tensor: Tensor) -> Tensor:
    """float16, or float32 where a value is too large for it."""
    half = tensor.to(torch.float16)
    return half if torch.isfinite(half).all() else tensor.float()


def _decoded(thumbnail: Any) -> bytes | None:
    """The JPEG's bytes. A thumbnail that cannot be read is no reason to refuse an embedding."""
    try:
        return base64.b64decode(thumbnail, validate=True)
    except (TypeError, ValueError):
        return None
