"""Keys and values of a *source* that queries read on top of their own sequence, each by a gate of its own.

A query of gate g weighs every key of the source g times: a shift log g of its scores, one number per query, so that no
matrix of queries by keys exists. Gate 0 drops the source exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bias import UNSEEN

STRONGEST = 2.0


class Source:
    """`keys` and `values` [B, H, N, d], N of their own; `gate` [S] or [B, S] in 0..2, one number per query.

    The gate is data, not a parameter: no gradient flows into it. It is read back from the device once.

    trivial: the gate is 0 everywhere, so nothing is read.
    hard:    the gate holds nothing but 0 and 1.
    """

    def __init__(self, keys: Tensor, values: Tensor, gate: Tensor) -> None:
        if keys.dim() != 4 or keys.shape != values.shape or not keys.shape[2]:
            raise ValueError(
                f"A source's keys and values have one shape [B, H, N, d], not {list(keys.shape)}, {list(values.shape)}."
            )
        if gate.dim() not in (1, 2) or gate.requires_grad:
            raise ValueError(f"A gate is [S] or [B, S] and carries no gradient; got {list(gate.shape)}.")
        self.keys, self.values = keys, values
        self.gate = (gate if gate.dim() == 2 else gate.unsqueeze(0)).to(torch.float32)
        if not bool(((self.gate >= 0) & (self.gate <= STRONGEST)).all()):  # NaN is outside too
            raise ValueError(f"A gate lies between 0 and {STRONGEST:g}; clamp it.")
        self.trivial = not bool(self.gate.any())
        self.hard = bool(((self.gate == 0) | (self.gate == 1)).all())

    def check(self, q: Tensor) -> None:
        """ValueError unless q [B, H, S, d] fits the keys and the gate."""
        batch, heads, length, width = q.shape
        if self.keys.shape[:2] != (batch, heads) or self.keys.shape[3] != width:
            raise ValueError(f"The source's keys {list(self.keys.shape)} do not fit the queries {list(q.shape)}.")
        if self.gate.shape[1] != length or self.gate.shape[0] not in (1, batch):
            raise ValueError(f"The gate is {list(self.gate.shape)}, but the queries are {list(q.shape)}.")

    def to(self, dtype: torch.dtype) -> Source:
        """The same with keys and values of the dtype; nothing is read back again."""
        return self._with(self.keys.to(dtype), self.values.to(dtype), self.gate)

    def entry(self, index: int) -> Source:
        """That of one entry of the batch."""
        one, gate = slice(index, index + 1), index % self.gate.shape[0]
        return self._with(self.keys[one], self.values[one], self.gate[gate : gate + 1])

    def _with(self, keys: Tensor, values: Tensor, gate: Tensor) -> Source:
        other = object.__new__(Source)
        other.keys, other.values, other.gate = keys, values, gate
        other.trivial, other.hard = self.trivial, self.hard
        return other

    def shift(self, dtype: torch.dtype) -> Tensor:
        """[B or 1, 1, S] log g in at least float32, UNSEEN where the gate is 0."""
        return self.gate.to(torch.promote_types(dtype, torch.float32)).log().clamp(min=UNSEEN).unsqueeze(1)
