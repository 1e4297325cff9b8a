"""Semantic embedding -> CONDITIONING: tokens as cross-attention, pooled, and the layout under `model_conds`."""

from __future__ import annotations

import comfy.conds
import torch
from torch import Tensor

from ...kernels import layout
from ...kernels.embedding import SemanticEmbedding

LAYOUT_KEY = "sda_layout"
MASKS_KEY = "sda_masks"  # only where there are masks
FLUX_POOLED = 768
_CONTROLNET_KEY = "cross_attn_controlnet"  # core's: what a ControlNet reads in place of the cross-attention


def to_conditioning(embedding: SemanticEmbedding, text: list | None = None) -> list:
    """CONDITIONING with the region tokens first, text (if any) after them.

    text: ordinary CONDITIONING; every entry of it gives one entry of the result and keeps its own settings. An entry
        that is itself an embedding's keeps its layout: its tokens follow ours as further region tokens.
    The pooled vector is the text's, else the adapter's, else zeros. A ControlNet, which knows no boxes, reads the text
    alone, else the tokens that own the whole image; with neither it reads what Flux reads.
    """
    own = embedding.to("cpu", torch.float32)
    if text is None:
        return [[own.tokens, _settings(own, {}, None)]]
    return [[_join(own.tokens, tokens), _settings(own, settings, tokens)] for tokens, settings in text]


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


def _settings(embedding: SemanticEmbedding, settings: dict, text: Tensor | None) -> dict:
    if settings.get("attention_mask") is not None:
        raise ValueError(
            "The text conditioning already carries an attention mask: apply the style model after Embedding to "
            "Conditioning, not before."
        )
    conds = dict(settings.get("model_conds", {}))
    settings = dict(settings)
    if _CONTROLNET_KEY not in settings:
        prompt = _whole_image(embedding) if text is None or LAYOUT_KEY in conds else text
        if prompt is not None:
            settings[_CONTROLNET_KEY] = prompt
    own = layout.encode(embedding)
    if LAYOUT_KEY in conds:
        there = conds[MASKS_KEY].cond if MASKS_KEY in conds else None
        own = layout.join(own, (conds[LAYOUT_KEY].cond, there))
    for key, part in zip((LAYOUT_KEY, MASKS_KEY), own):
        if part is not None:
            conds[key] = comfy.conds.CONDRegular(part)
    given = settings.get("pooled_output")
    if given is None:
        given = embedding.pooled if embedding.pooled is not None else _zeros(embedding)
    return {**settings, "pooled_output": given, "model_conds": conds}


def _whole_image(embedding: SemanticEmbedding) -> Tensor | None:
    chosen = (embedding.boxes == embedding.boxes.new_tensor([0.0, 0.0, 1.0, 1.0])).all(-1)
    if embedding.masked_by is not None:
        chosen &= embedding.masked_by < 0
    return embedding.tokens[:, chosen] if chosen.any() else None


def _zeros(embedding: SemanticEmbedding) -> Tensor:
    # Core cuts a longer pooled vector to the model's width, so without word from the adapter a long one is right too.
    width = embedding.source.get("pooled_width") or max(FLUX_POOLED, embedding.width)
    return torch.zeros(embedding.batch, width)
