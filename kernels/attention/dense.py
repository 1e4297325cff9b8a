"""Route *dense*: one attention with a mask over the whole sequence. Memory grows with the sequence squared."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .bias import Regions


def dense_attention(q: Tensor, k: Tensor, v: Tensor, regions: Regions) -> Tensor:
    bias = regions.floored().to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=F.pad(bias, (0, k.shape[2] - regions.tokens)))
