"""Keys and values of a *source* that queries read on top of their own sequence, each by a gate of its own.

A query of gate g weighs every key of the source g times: a shift log g of its scores, one number per query, so that no
matrix of queries by keys exists. Gate 0 drops the source exactly.

A source may stand *instead* of a part of the sequence, its own image: that part's keys then weigh 1 - g. So a source that
says what the picture says changes nothing, at any gate; read on top, it would count twice, to the text's cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bias import UNSEEN

STRONGEST = 2.0


class Source:
    """`keys` and `values` [B, H, N, d], N of their own; `gate` [S] or [B, S] in 0..2, one number per query. `instead`: from
    which of the sequence's own keys to which the source stands in for; None where it is read on top of all.

    The gate is data, not a parameter: no gradient flows into it. It is read back from the device once.

    trivial: the gate is 0 everywhere, so nothing is read.
    hard:    the gate holds nothing but 0 and 1.
    """

    def __init__(self, keys: Tensor, values: Tensor, gate: Tensor, instead: tuple[int, int] | None = None) -> None:
        if keys.dim() != 4 or keys.shape != values.shape or not keys.shape[2]:
            raise ValueError(
                f"A source's keys and values have one shape [B, H, N, d], not {list(keys.shape)}, {list(values.shape)}."
            )
        if gate.dim() not in (1, 2) or gate.requires_grad:
            raise ValueError(f"A gate is [S] or [B, S] and carries no gradient; got {list(gate.shape)}.")
        self.keys, self.values, self.instead = keys, values, instead
        self.gate = (gate if gate.dim() == 2 else gate.unsqueeze(0)).to(torch.float32)
        if not bool(((self.gate >= 0) & (self.gate <= STRONGEST)).all()):  # NaN is outside too
            raise ValueError(f"A gate lies between 0 and {STRONGEST:g}; clamp it.")
        self.trivial = not bool(self.gate.any())
        self.hard = bool(((self.gate == 0) | (self.gate == 1)).all())

    def check(self, q: Tensor, k: Tensor, tokens: int = 0) -> None:
        """ValueError unless q [B, H, S, d] fits the keys and the gate, and k [B, H, L, d] has what the source stands in for,
        beyond its first `tokens`, those of regions."""
        batch, heads, length, width = q.shape
        if self.keys.shape[:2] != (batch, heads) or self.keys.shape[3] != width:
            raise ValueError(f"The source's keys {list(self.keys.shape)} do not fit the queries {list(q.shape)}.")
        if self.gate.shape[1] != length or self.gate.shape[0] not in (1, batch):
            raise ValueError(f"The gate is {list(self.gate.shape)}, but the queries are {list(q.shape)}.")
        if self.instead is not None and not tokens <= self.instead[0] < self.instead[1] <= k.shape[2]:
            raise ValueError(f"A source stands instead of keys {self.instead} of {k.shape[2]}, of which {tokens} are regions'.")

    def to(self, dtype: torch.dtype) -> Source:
        """The same with keys and values of the dtype; nothing is read back again."""
        return self._with(self.keys.to(dtype), self.values.to(dtype), self.gate)

    def entry(self, index: int) -> Source:
        """That of one entry of the batch."""
        one, gate = slice(index, index + 1), index % self.gate.shape[0]
        return self._with(self.keys[one], self.values[one], self.gate[gate : gate + 1])

    def over(self, keys: Tensor, values: Tensor) -> Source:
        """The same gate over other keys and values, those of another block; nothing is read back again."""
        return self._with(keys, values, self.gate)

    def _with(self, keys: Tensor, values: Tensor, gate: Tensor) -> Source:
        other = object.__new__(Source)
        other.keys, other.values, other.gate, other.instead = keys, values, gate, self.instead
        other.trivial, other.hard = self.trivial, self.hard
        return other

    def shift(self, dtype: torch.dtype) -> Tensor:
        """[B or 1, 1, S] log g in at least float32, UNSEEN where the gate is 0."""
        return self.gate.to(torch.promote_types(dtype, torch.float32)).log().clamp(min=UNSEEN).unsqueeze(1)

    def own(self, dtype: torch.dtype) -> Tensor:
        """[B or 1, 1, S] log (1 - g), UNSEEN from 1 on: the shift towards the keys that the source stands in for."""
        rest = (1 - self.gate).clamp(min=0).to(torch.promote_types(dtype, torch.float32))
        return rest.log().clamp(min=UNSEEN).unsqueeze(1)
