"""The hooks of one forward that steer it: on the projections, norms and modulations of Flux's own modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.blocks import Blocks
from ...kernels.directions import bounded, orthogonal, relevance, steered


class Push(NamedTuple):
    """One direction of this forward. where [1 or B, patches] in 0..1; blocks: the double blocks it acts in, None for all."""

    strength: float
    bounded: bool
    threshold: float
    blocks: Blocks | None
    where: Tensor


class Steering:
    """What the hooks know of one forward.

    painted: rows before the companions'; pictures: of the batch; positives: places of the steered conditionings in it. Each
    of them has its companions in their order: one for each push, then the empty prompt. pads: tokens of no text before each
    companion's own. patches: of the picture, at the head of the image stream. kinds: the batch's `cond_or_uncond` without
    companions. record: is given [B, patches] on the CPU for every mask of the last push, or None.
    """

    def __init__(
        self, painted: int, pictures: int, positives: list[int], pushes: list[Push], pads: list[int], patches: int,
        kinds: list[int], record: Callable[[Tensor], None] | None,
    ) -> None:  # fmt: skip
        self._painted, self._pictures, self._positives, self._kinds = painted, pictures, positives, kinds
        self._pushes, self._pads, self._patches, self._record = pushes, pads, patches, record
        self._rows = painted + pictures * len(positives) * len(pads)
        self._queries: Tensor | None = None
        self._keys: Tensor | None = None

    @contextmanager
    def hooked(self, network: nn.Module, shift: Tensor | None) -> Iterator[None]:
        """The hooks, as long as the context lasts. shift [rows, hidden]: added to what modulates the text of double blocks."""
        with ExitStack() as stack:

            def hook(handle) -> None:
                stack.callback(handle.remove)

            for index, block in enumerate(network.double_blocks):
                if shift is not None:
                    hook(block.txt_mod.register_forward_pre_hook(lambda _, args: (args[0] + shift.to(args[0]), *args[1:])))
                if self._pushes:
                    hook(block.img_attn.norm.register_forward_hook(self._hear))
                    hook(block.txt_attn.norm.register_forward_hook(self._say))
                    hook(block.img_attn.proj.register_forward_hook(lambda _, args, out, index=index: self._steer(index, out)))
            if self._pushes:
                for module in (*network.single_blocks, network.final_layer):
                    hook(module.register_forward_pre_hook(self._leave, with_kwargs=True))
            yield

    def _hear(self, module: nn.Module, args: tuple, out: tuple[Tensor, Tensor]) -> None:
        self._queries = out[0]

    def _say(self, module: nn.Module, args: tuple, out: tuple[Tensor, Tensor]) -> None:
        self._keys = out[1]

    def _steer(self, index: int, out: Tensor) -> Tensor:
        """The output [rows, N, D] of a block's projection, in which companions go on with what their painted row does."""
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

    def _moved(self, index: int, out: Tensor, base: slice, companions: list[slice]) -> Tensor:
        total, empty = None, out[companions[-1]]
        for number, (push, rows) in enumerate(zip(self._pushes, companions)):
            if push.blocks is not None and ("double", index) not in push.blocks:
                continue
            mask = self._mask(number, push, base, rows, out)
            direction = orthogonal(out[rows], empty)
            strength = push.strength
            if push.bounded:
                strength = strength * bounded(out[base], direction, 1.0, mask)
            added = strength * mask.to(direction).unsqueeze(-1) * direction
            total = added if total is None else total + added
        return out[base] if total is None else steered(out[base], total, 1.0)

    def _mask(self, number: int, push: Push, base: slice, rows: slice, out: Tensor) -> Tensor:
        """[B, N]: where a push acts in the image stream, whose references it leaves alone."""
        where = push.where.expand(self._pictures, -1)
        if push.threshold > 0:
            queries, keys = self._queries[base][:, :, : self._patches], self._keys[rows][:, :, self._pads[number] :]
            heard = relevance(queries, keys, push.threshold)
            where = where.to(heard) * heard
        if self._record is not None and number == len(self._pushes) - 1:
            self._record(where.float().cpu())
        return nn.functional.pad(where, (0, out.shape[1] - self._patches))

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of a module without the companions' rows; from here on they are not in the batch."""
        options = kwargs.get("transformer_options")
        if options and "cond_or_uncond" in options:
            options["cond_or_uncond"] = self._kinds
        return tuple(map(self._own, args)), {key: self._own(value) for key, value in kwargs.items()}

    def _own(self, value: Any) -> Any:
        rows = torch.is_tensor(value) and value.ndim > 0 and len(value) == self._rows
        return value[: self._painted] if rows else value
