"""Semantic embedding -> CONDITIONING: tokens as cross-attention, pooled, and the layout under `model_conds`."""

from __future__ import annotations

import comfy.conds
import torch
from torch import Tensor

from ...kernels.embedding import SemanticEmbedding
from . import layout

LAYOUT_KEY = "sda_layout"
FLUX_POOLED = 768


def to_conditioning(embedding: SemanticEmbedding, text: list | None = None) -> list:
    """CONDITIONING with the region tokens first, text (if any) after them.

    text: ordinary CONDITIONING; every entry of it gives one entry of the result and keeps its own settings. An entry
        that is itself an embedding's keeps its layout: its tokens follow ours as further region tokens.
    The pooled vector is the text's, else the adapter's, else zeros.
    """
    own = embedding.to("cpu", torch.float32)
    if text is None:
        return [[own.tokens, _settings(embedding, {}, own.pooled)]]
    return [[_join(own.tokens, tokens), _settings(embedding, settings, own.pooled)] for tokens, settings in text]


def _join(tokens: Tensor, text: Tensor) -> Tensor:
    if text.shape[-1] != tokens.shape[-1]:
        raise ValueError(
            f"The text conditioning has width {text.shape[-1]} and the embedding {tokens.shape[-1]}: "
            "encode the text with the CLIP of the model that the adapter was trained for."
        )
    batch = max(tokens.shape[0], text.shape[0])
    if tokens.shape[0] not in (1, batch) or text.shape[0] not in (1, batch):
        raise ValueError(
            f"The embedding holds {tokens.shape[0]} images and the text conditioning {text.shape[0]} prompts: "
            "use equal numbers, or one of either."
        )
    return torch.cat([tokens.expand(batch, -1, -1), text.to(tokens).expand(batch, -1, -1)], dim=1)


def _settings(embedding: SemanticEmbedding, settings: dict, pooled: Tensor | None) -> dict:
    if settings.get("attention_mask") is not None:
        raise ValueError(
            "The text conditioning already carries an attention mask: apply the style model after Embedding to "
            "Conditioning, not before."
        )
    conds = dict(settings.get("model_conds", {}))
    own = layout.encode(embedding)
    if LAYOUT_KEY in conds:
        other = conds[LAYOUT_KEY].cond
        own = torch.cat([own.expand(other.shape[0], -1, -1), other], dim=1)
    conds[LAYOUT_KEY] = comfy.conds.CONDRegular(own)
    given = settings.get("pooled_output")
    if given is None:
        given = pooled if pooled is not None else _zeros(embedding)
    return {**settings, "pooled_output": given, "model_conds": conds}


def _zeros(embedding: SemanticEmbedding) -> Tensor:
    # Core cuts a longer pooled vector to the model's width, so without word from the adapter a long one is right too.
    width = embedding.source.get("pooled_width") or max(FLUX_POOLED, embedding.width)
    return torch.zeros(embedding.batch, width)
