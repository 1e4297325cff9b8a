"""Directions: an attribute is edited inside the attention, by a strength that acts linearly (FluxSpace, arXiv 2412.09611).

In every double block the attention of three prompts over one image is compared: the *base*, the *edit* (a bare attribute)
and the *empty* prompt. What the edit adds beyond the empty prompt is the direction. All tensors are outputs of the block's
projection on the image rows, [B, N, D], of any floating dtype; the arithmetic is in float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-10  # of the published code: what is divided by is at least this
_SLOPE = 10.0  # of the sigmoid in the published mask


def orthogonal(x: Tensor, away: Tensor) -> Tensor:
    """The part of vectors x [..., D] at right angles to `away`; x itself where `away` is zero."""
    x, away = _wide(x), _wide(away)
    along = (x * away).sum(-1, keepdim=True) / (away.square().sum(-1, keepdim=True) + _TINY)
    return x - along * away


def steered(base: Tensor, direction: Tensor, strength: Tensor | float, mask: Tensor | None = None) -> Tensor:
    """base + strength * mask * direction, every token as long as it was: [B, N, D] in the dtype of `base`.

    direction: of one attribute, `orthogonal(edit, empty)`, or the sum of several with their strengths. strength: a number
    or [B, 1, 1]. mask [B, N] in 0..1. Where strength, mask or direction are zero, base comes back bit for bit.
    """
    wide = _wide(base)
    push = strength * direction if mask is None else strength * mask.to(direction).unsqueeze(-1) * direction
    moved = wide + push
    before, after = wide.norm(dim=-1, keepdim=True), moved.norm(dim=-1, keepdim=True)
    moved = moved * torch.where(after > 0, before / after.clamp_min(torch.finfo(wide.dtype).tiny), 1)
    return torch.where(push.any(-1, keepdim=True), moved.to(base.dtype), base)


def bounded(base: Tensor, direction: Tensor, share: float, mask: Tensor | None = None) -> Tensor:
    """[B, 1, 1]: the strength at which what is added is as large as `share` of the base's output, over a sample's tokens.

    Too large an addition is what pictures break by, whatever the attribute. Where the direction is zero, so is the strength.
    """
    if not share >= 0:
        raise ValueError(f"The share of a direction is 0 or more, not {share:g}.")
    direction = _wide(direction) if mask is None else mask.to(direction).unsqueeze(-1) * _wide(direction)
    size = direction.norm(dim=(1, 2), keepdim=True)
    return torch.where(size > 0, share * _wide(base).norm(dim=(1, 2), keepdim=True) / size.clamp_min(_TINY), 0)


def relevance(queries: Tensor, keys: Tensor, threshold: float) -> Tensor:
    """[B, N] in 0..1: where an edit's prompt is heard, by the attention of image queries [B, H, N, d] to its text's keys
    [B, H, T, d], both without positions.

    The share that goes to the text's first token, the mean over heads, stretched to 0..1 in each sample, through a steep
    sigmoid; exactly 0 below the threshold. Where all patches hear alike, all are 0.5 before the threshold.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"The threshold of a direction's mask lies between 0 and 1, not {threshold:g}.")
    queries, keys = _wide(queries), _wide(keys)
    scores = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
    heard = scores.softmax(-1)[..., 0].mean(1)
    low, high = heard.amin(1, keepdim=True), heard.amax(1, keepdim=True)
    span = high - low
    place = torch.where(span > 0, (heard - low) / span.clamp_min(torch.finfo(heard.dtype).tiny), 0.5)
    mask = torch.sigmoid(_SLOPE * (place - 0.5))
    return mask.masked_fill(mask < threshold, 0)


def coarse(pooled: Tensor, edit: Tensor, amount: float) -> Tensor:
    """(1 - amount) p + amount * (the edit's pooled vector at right angles to p), [B, P] in the dtype of `pooled`.

    For the norms of the text's side alone. amount 0..1; at 0 bit for bit `pooled`.
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"The coarse amount of a direction lies between 0 and 1, not {amount:g}.")
    if amount == 0:
        return pooled
    return ((1 - amount) * _wide(pooled) + amount * orthogonal(edit, pooled)).to(pooled.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
