"""Embedding files: a semantic embedding in the checkpoint format, kind `embedding`.

Tokens and pooled vector are stored in half precision (128 tokens of width 4096 are 1 MiB), masks in 8 bits, boxes,
levels, strengths and a schedule as they are. The record holds what the embedding says of its source, its widths and a small JPEG.
"""

from __future__ import annotations

import base64
import os
from typing import Annotated, Any

import torch
from annotated_types import Len
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from . import checkpoint, schema
from .embedding import MASK_SIDE, SemanticEmbedding
from .hierarchy import MAX_TOKENS

KIND = "embedding"
SUFFIX = ".safetensors"
# Files hold finite numbers only; this one stands for a strength of -inf.
_OFF = torch.finfo(torch.float32).min
_ALWAYS = ("tokens", "boxes", "levels", "strengths")
_SOMETIMES = ("pooled", "masks", "masked_by", "schedule")
_HALF = ("F16", "F32")


class Source(BaseModel):
    """Where an embedding came from: what the nodes read of it, and anything else.

    None stands for a field that is not there.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    adapter: schema.Name = None
    pooled_width: schema.Width = None
    edits: Annotated[list[str], Len(0, 10_000)] = None


class Size(schema.Closed):
    batch: schema.whole(1, 4096)
    tokens: schema.whole(1, MAX_TOKENS)


class Record(BaseModel):
    """What the record of an embedding file says beside what every record does."""

    config: Size
    widths: checkpoint.Widths
    source: Source


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
    """ValueError in one sentence if this is no whole embedding file that this pack reads.

    Does not look at the numbers.
    """
    record, table = checkpoint.read_table(path, KIND)
    said = schema.parse(
        Record, {name: record[name] for name in Record.model_fields if name in record}, f"The record in {path}"
    )
    tokens, batch = said.config.tokens, said.config.batch
    masks = table.get("masks", ("U8", (0,)))[1][:1]
    expected = {
        "tokens": (_HALF, (batch, tokens, said.widths.text)),
        "boxes": (("F32",), (tokens, 4)),
        "levels": (("I64",), (tokens,)),
        "strengths": (("F32",), (tokens,)),
    }
    if said.widths.pooled is not None:
        expected["pooled"] = (_HALF, (batch, said.widths.pooled))
    if "masks" in table or "masked_by" in table:
        expected |= {"masks": (("U8",), (*masks, MASK_SIDE, MASK_SIDE)), "masked_by": (("I64",), (tokens,))}
    if "schedule" in table:
        expected["schedule"] = (("F32",), (tokens, 2))
    for name in sorted(expected.keys() | table.keys()):
        if name not in table:
            raise ValueError(f"{path} lacks {name!r}: save the embedding again.")
        if name not in expected:
            raise ValueError(
                f"{path} has the tensor {schema.short(name)}, which its record does not speak of: save the embedding again."
            )
        (dtypes, shape), (dtype, found) = expected[name], table[name]
        if dtype not in dtypes or found != shape:
            raise ValueError(
                f"{name!r} in {path} is {dtype} {list(found)} where its record implies {' or '.join(dtypes)} {list(shape)}: save the "
                "embedding again."
            )


def load(path: str | os.PathLike) -> tuple[SemanticEmbedding, bytes | None]:
    """(embedding with float32 tokens on the CPU, JPEG bytes or None) of an embedding file.

    Raises ValueError in one sentence: truncated, no embedding, newer version, not finite, parts missing, misshapen or
    unknown.
    """
    check(path)
    tensors, record = checkpoint.load(path, KIND)
    # A copy: what was read is a view of the file, which must stay free to be replaced or deleted.
    parts = {name: tensors[name].clone() for name in (*_ALWAYS, *_SOMETIMES) if name in tensors}
    parts |= {name: parts[name].float() for name in ("tokens", "pooled") if name in parts}
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
