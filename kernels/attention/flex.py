"""Route *flex*: PyTorch's flex_attention with the bias as a score modification. Fast only where it is compiled.

There is no block mask: the region tokens are one or two of its blocks of 128 keys, and every such block is seen by some
query of every block of queries, so there would be nothing to skip.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .bias import Regions

try:  # PyTorch before 2.5 has none
    from torch.nn.attention import flex_attention as _module
except ImportError:
    _module = None

AVAILABLE = _module is not None


def flex_attention(q: Tensor, k: Tensor, v: Tensor, regions: Regions) -> Tensor:
    if not AVAILABLE:
        raise ValueError("This PyTorch has no flex_attention; take the route merge or PyTorch 2.5 or newer.")
    bias, last = regions.floored()[:, 0], regions.tokens - 1
    batched = regions.batch > 1

    def score(value: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # Keys beyond the region tokens read the last column, so that the index stays inside, and leave it unused.
        shift = bias[b if batched else 0, query, key.clamp(max=last)]
        return torch.where(key <= last, value + shift, value)

    # On a CPU it runs as it is: exact, but with the whole score matrix in memory.
    attend = _compiled() if q.device.type == "cuda" and not torch.compiler.is_compiling() else _module.flex_attention
    return attend(q, k, v, score_mod=score)


@cache
def _compiled():
    return torch.compile(_module.flex_attention)
