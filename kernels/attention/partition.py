"""Route *partition*: queries that see the same tokens are gathered and attend, unmasked, to the keys they see.

Needs nothing but an unmasked attention function, so whatever kernel the host runs (SageAttention, flash) stays in use.
It cannot express strengths: a token is there or it is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .bias import Group, Regions
from .source import Source


def partition_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Regions | None,
    plain: Callable[[Tensor, Tensor, Tensor], Tensor],
    source: Source | None = None,
) -> Tensor:
    if regions is not None and not regions.hard:
        raise ValueError("The partition route knows no strengths other than 0 and -inf; take the route merge.")
    if source is not None and not source.hard:
        raise ValueError("The partition route knows no gates other than 0 and 1; take the route merge.")
    tokens = regions.tokens if regions else 0
    entries = regions.groups() if regions else [[Group(torch.arange(q.shape[2], device=q.device), None)]]
    if len(entries) == 1 and (source is None or source.gate.shape[0] == 1):
        gate = None if source is None else source.gate[0]
        return _attend(q, k, v, tokens, entries[0], plain, source, gate)
    outs = []
    for index in range(q.shape[0]):
        one = slice(index, index + 1)
        gate = None if source is None else source.gate[index % source.gate.shape[0]]
        read = None if source is None else source.entry(index)
        groups = entries[index % len(entries)]
        outs.append(_attend(q[one], k[one], v[one], tokens, groups, plain, read, gate))
    return torch.cat(outs)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: int,
    groups: list[Group],
    plain: Callable,
    source: Source | None,
    gate: Tensor | None,
) -> Tensor:
    outs, order = [], []
    for rows, columns in groups:
        keys, values = (k, v) if columns is None else (_seen(k, columns, tokens), _seen(v, columns, tokens))
        closed = rows if source is None else rows[gate[rows] == 0]
        if len(closed):
            outs.append(plain(q.index_select(2, closed), keys, values))
            order.append(closed)
        if len(closed) < len(rows):
            opened = rows[gate[rows] != 0]
            if source.instead is not None:
                first, last = (k.shape[2] - place for place in source.instead)  # from the end, which no group cuts
                keys, values = (_without(each, each.shape[2] - first, each.shape[2] - last) for each in (keys, values))
            keys, values = torch.cat([keys, source.keys], dim=2), torch.cat([values, source.values], dim=2)
            outs.append(plain(q.index_select(2, opened), keys, values))
            order.append(opened)
    return torch.cat(outs, dim=2).index_select(2, torch.argsort(torch.cat(order)))


def _without(keys: Tensor, first: int, last: int) -> Tensor:
    return torch.cat([keys[:, :, :first], keys[:, :, last:]], dim=2)


def _seen(keys: Tensor, columns: Tensor, tokens: int) -> Tensor:
    return torch.cat([keys.index_select(2, columns), keys[:, :, tokens:]], dim=2)
