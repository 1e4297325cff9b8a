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
from .source import Source

__all__ = ["ROUTES", "Regions", "Source", "choose", "masked_attention"]

ROUTES = ("merge", "partition", "flex", "dense")

# Above this many groups (a layout of many overlapping boxes) their launches cost more than the mask does.
MOST_GROUPS = 64


def choose(
    q: Tensor, k: Tensor, v: Tensor, regions: Regions | None, keep_plain: bool = False, source: Source | None = None
) -> str:
    """The route that `masked_attention(..., route="auto")` takes, or "plain" where nothing is masked nor read."""
    inputs = (q, k, v) if source is None else (q, k, v, source.keys, source.values)
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if source is None and (regions is None or regions.trivial):
        return "plain"
    if torch.compiler.is_compiling():  # the other routes would break its graph
        if source is not None:
            return "dense"
        return "flex" if q.device.type == "cuda" and q.dtype != torch.float64 and flex.AVAILABLE else "dense"
    if q.dtype == torch.float64:  # asks for the reference
        return "dense"
    if keep_plain and not gradients and _few_groups(regions, source):
        return "partition"
    chosen = merge.kernels(q, k, v, regions)
    if chosen is not None and selfcheck.agrees(chosen, q, gradients):
        return "merge"
    return "partition" if _few_groups(regions, source) else "dense"


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Regions | None,
    route: str = "auto",
    plain: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    keep_plain: bool = False,
    source: Source | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, the bias on the first T keys only, differentiable in q, k and v.

    q and the result are [B, H, S, d], k and v [B, H, L, d] (keys without queries come last), of one floating dtype and
    device; under autocast they are cast as PyTorch's own attention casts them. `plain(q, k, v)` is the host's unmasked
    attention on such tensors (PyTorch's if not given): called as it is where nothing is masked, and by *partition* for
    every group, with fewer queries than keys. `keep_plain` says that the host runs another kernel than PyTorch's
    (SageAttention, flash) that is to be kept.

    `source`: keys and values that every query reads as well, or instead of some of its own, by its gate; differentiable
    in both. Without regions (None) nothing else is masked. The route flex has no source.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        q, k, v = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (q, k, v))
        source = source and source.to(q.dtype)
    if regions is not None:
        regions.check(q, k, v)
        regions = None if regions.trivial else regions
    if source is not None:
        source.check(q, k, regions.tokens if regions else 0)
        source = None if source.trivial else source
    plain = plain or F.scaled_dot_product_attention
    if route == "auto":
        route = choose(q, k, v, regions, keep_plain, source)
    if route == "plain" or (regions is None and source is None):
        return plain(q, k, v)
    if route == "merge":
        return merge.merge_attention(q, k, v, regions, source=source)
    if route == "partition":
        return partition_attention(q, k, v, regions, plain, source)
    if route == "flex":
        if source is not None:
            raise ValueError("The route flex reads no source; take the route merge.")
        return flex.flex_attention(q, k, v, regions)
    if route == "dense":
        return dense_attention(q, k, v, regions, source)
    raise ValueError(f"There is no attention route {route!r}; choose auto, {', '.join(ROUTES)}.")


def _few_groups(regions: Regions | None, source: Source | None) -> bool:
    if not ((regions is None or regions.hard) and (source is None or source.hard)):
        return False
    groups = sum(len(groups) for groups in regions.groups()) if regions else 1
    return groups * (1 if source is None else 2) <= MOST_GROUPS
