"""What hooks on a Flux do while one forward is steered: companions beside the painted rows, one image stream for all.

The hooks themselves are put in place by whoever runs the forward (`nodes/host/steering.py`, the evaluation of the miniature):
this knows tensors alone. The arithmetic is that of `directions`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .blocks import Blocks
from .directions import bounded, orthogonal, relevance, steered


class Push(NamedTuple):
    """One direction of a forward.

    strength: the raw factor, or with `bounded` the share of the attention's output that is added. threshold: of the
    direction's own mask, 0 for none. blocks: the double blocks it acts in, None for all. where [1 or B, patches] in 0..1.
    """

    strength: float
    bounded: bool
    threshold: float
    blocks: Blocks | None
    where: Tensor


class Steering:
    """One forward of a batch of painted rows with companions behind them.

    painted: rows before the companions'; pictures: of the batch; positives: places of the steered conditionings in it. Each
    of them has its companions in their order: one for each push, then the empty prompt. pads: tokens of no text before each
    companion's own. patches: of the picture, at the head of the image stream. record: is given [B, patches] on the CPU for
    every mask of the last push.
    """

    def __init__(
        self, painted: int, pictures: int, positives: list[int], pushes: list[Push], pads: list[int], patches: int,
        record: Callable[[Tensor], None] | None = None,
    ) -> None:  # fmt: skip
        self._painted, self._pictures, self._positives = painted, pictures, positives
        self._pushes, self._pads, self._patches, self._record = pushes, pads, patches, record
        self._rows = painted + pictures * len(positives) * len(pads)
        self._queries: Tensor | None = None
        self._keys: Tensor | None = None

    def hear(self, queries: Tensor) -> None:
        """The image's queries [rows, H, N, d] of the block that runs, normalised, without positions."""
        self._queries = queries

    def say(self, keys: Tensor) -> None:
        """The text's keys [rows, H, T, d], likewise."""
        self._keys = keys

    def steer(self, index: int, out: Tensor) -> Tensor:
        """The image rows [rows, N, D] of a double block's attention after its projection, in which companions go on with
        what their painted row does."""
        out, count, step = out.clone(), self._pictures, self._pictures * len(self._pads)
        for group, place in enumerate(self._positives):
            base = slice(place * count, (place + 1) * count)
            first = self._painted + group * step
            companions = [slice(first + number * count, first + (number + 1) * count) for number in range(len(self._pads))]
            moved = self._moved(index, out, base, companions)
            for rows in (base, *companions):
                out[rows] = moved
        self._queries = self._keys = None
        return out

    def own(self, value: Any) -> Any:
        """A tensor of all rows without the companions'; anything else as it is."""
        rows = torch.is_tensor(value) and value.ndim > 0 and len(value) == self._rows
        return value[: self._painted] if rows else value

    def _moved(self, index: int, out: Tensor, base: slice, companions: list[slice]) -> Tensor:
        total, empty = None, out[companions[-1]]
        for number, (push, rows) in enumerate(zip(self._pushes, companions)):
            if push.blocks is not None and ("double", index) not in push.blocks:
                continue
            mask = self._mask(number, push, base, rows, out.shape[1])
            direction = orthogonal(out[rows], empty)
            strength = push.strength
            if push.bounded:
                strength = strength * bounded(out[base], direction, 1.0, mask)
            added = strength * mask.to(direction).unsqueeze(-1) * direction
            total = added if total is None else total + added
        return out[base] if total is None else steered(out[base], total, 1.0)

    def _mask(self, number: int, push: Push, base: slice, rows: slice, length: int) -> Tensor:
        """[B, N]: where a push acts in the image stream, whose references it leaves alone."""
        where = push.where.expand(self._pictures, -1)
        if push.threshold > 0:
            queries, keys = self._queries[base][:, :, : self._patches], self._keys[rows][:, :, self._pads[number] :]
            heard = relevance(queries, keys, push.threshold)
            where = where.to(heard) * heard
        if self._record is not None and number == len(self._pushes) - 1:
            self._record(where.float().cpu())
        return pad(where, (0, length - self._patches))
