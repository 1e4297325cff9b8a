"""Route *partition*: queries that see the same tokens are gathered and attend, unmasked, to the keys they see.

Needs nothing but an unmasked attention function, so whatever kernel the host runs (SageAttention, flash) stays in use.
It cannot express strengths: a token is there or it is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .bias import Group, Regions


def partition_attention(
    q: Tensor, k: Tensor, v: Tensor, regions: Regions, plain: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    if not regions.hard:
        raise ValueError("The partition route knows no strengths other than 0 and -inf; take the route merge.")
    entries = regions.groups()
    if len(entries) == 1:
        return _attend(q, k, v, regions.tokens, entries[0], plain)
    outs = [
        _attend(q[index : index + 1], k[index : index + 1], v[index : index + 1], regions.tokens, groups, plain)
        for index, groups in enumerate(entries)
    ]
    return torch.cat(outs)


def _attend(q: Tensor, k: Tensor, v: Tensor, tokens: int, groups: list[Group], plain: Callable) -> Tensor:
    outs = []
    for rows, columns in groups:
        keys, values = (k, v) if columns is None else (_seen(k, columns, tokens), _seen(v, columns, tokens))
        outs.append(plain(q.index_select(2, rows), keys, values))
    back = torch.argsort(torch.cat([group.rows for group in groups]))
    return torch.cat(outs, dim=2).index_select(2, back)


def _seen(keys: Tensor, columns: Tensor, tokens: int) -> Tensor:
    return torch.cat([keys.index_select(2, columns), keys[:, :, tokens:]], dim=2)
