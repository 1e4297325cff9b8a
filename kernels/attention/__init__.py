"""Masked joint attention: every query sees its own region tokens and everything else.

The sequence is `[region tokens ; other text ; image patches ; reference patches]`; a log-bias on the first T keys says
which query sees which region token and how strongly (`visibility.region_bias`). Four routes give one result:

merge      attention to the unmasked keys and to the region tokens apart, joined by their log-sum-exps. The fastest.
partition  queries gathered by what they see, each group through the host's own unmasked attention.
flex       PyTorch's flex_attention, inside a model that the user compiled for CUDA.
dense      one mask over the whole sequence. The reference, and where nothing else can be had.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import flex, merge, selfcheck
from .bias import Regions
from .dense import dense_attention
from .partition import partition_attention

__all__ = ["ROUTES", "Regions", "choose", "masked_attention"]

ROUTES = ("merge", "partition", "flex", "dense")

# Above this many groups (a layout of many overlapping boxes) their launches cost more than the mask does.
MOST_GROUPS = 64


def choose(q: Tensor, k: Tensor, v: Tensor, regions: Regions, keep_plain: bool = False) -> str:
    """The route that `masked_attention(..., route="auto")` takes, or "plain" where nothing is masked."""
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if regions.trivial:
        return "plain"
    if torch.compiler.is_compiling():  # the other routes would break its graph
        return "flex" if q.device.type == "cuda" and q.dtype != torch.float64 and flex.AVAILABLE else "dense"
    if q.dtype == torch.float64:  # asks for the reference
        return "dense"
    if keep_plain and not gradients and _few_groups(regions):
        return "partition"
    chosen = merge.kernels(q, k, v, regions)
    if chosen is not None and selfcheck.agrees(chosen, q, gradients):
        return "merge"
    return "partition" if _few_groups(regions) else "dense"


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Regions,
    route: str = "auto",
    plain: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    keep_plain: bool = False,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, the bias on the first T keys only, differentiable in q, k and v.

    q and the result are [B, H, S, d], k and v [B, H, L, d] (keys without queries come last), of one floating dtype and
    device; under autocast they are cast as PyTorch's own attention casts them. `plain(q, k, v)` is the host's unmasked
    attention on such tensors (PyTorch's if not given): called as it is where nothing is masked, and by *partition* for
    every group, with fewer queries than keys. `keep_plain` says that the host runs another kernel than PyTorch's
    (SageAttention, flash) that is to be kept.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        q, k, v = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (q, k, v))
    regions.check(q, k, v)
    plain = plain or F.scaled_dot_product_attention
    if route == "auto":
        route = choose(q, k, v, regions, keep_plain)
    if route == "plain" or regions.trivial:
        return plain(q, k, v)
    if route == "merge":
        return merge.merge_attention(q, k, v, regions)
    if route == "partition":
        return partition_attention(q, k, v, regions, plain)
    if route == "flex":
        return flex.flex_attention(q, k, v, regions)
    if route == "dense":
        return dense_attention(q, k, v, regions)
    raise ValueError(f"There is no attention route {route!r}; choose auto, {', '.join(ROUTES)}.")


def _few_groups(regions: Regions) -> bool:
    return regions.hard and sum(len(groups) for groups in regions.groups()) <= MOST_GROUPS
