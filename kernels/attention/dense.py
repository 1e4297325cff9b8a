"""Route *dense*: one attention with a mask over the whole sequence. Memory grows with the sequence squared."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .bias import FLOOR, Regions
from .source import Source


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, regions: Regions | None, source: Source | None = None
) -> Tensor:
    bias = q.new_zeros((1, 1, q.shape[2], 0)) if regions is None else regions.floored().to(q.dtype)
    bias = F.pad(bias, (0, k.shape[2] - bias.shape[-1]))
    if source is not None:
        shift = source.shift(q.dtype).clamp(min=FLOOR).to(q.dtype)
        read = shift.unsqueeze(-1).expand(-1, -1, -1, source.keys.shape[2])
        batch = max(bias.shape[0], read.shape[0])
        if source.instead is not None:
            bias, (first, last) = bias.expand(batch, 1, q.shape[2], -1).clone(), source.instead
            bias[..., first:last] += source.own(q.dtype).clamp(min=FLOOR).to(q.dtype).unsqueeze(-1)
        bias = torch.cat([bias.expand(batch, -1, -1, -1), read.expand(batch, -1, -1, -1)], dim=-1)
        k, v = torch.cat([k, source.keys], dim=2), torch.cat([v, source.values], dim=2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
