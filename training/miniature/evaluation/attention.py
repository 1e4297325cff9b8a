"""Flux's attention while the miniature is measured: what it reads is set for one thread, since every core paints its own batch."""
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from ....kernels.attention import Regions, Source, masked_attention
from ....kernels.gate import sequence_gate
from ...frozen.gated_attention import before_reference, reference_source
from ...frozen.region_attention import RegionAttention


@contextmanager
def within(place: threading.local, **values: object) -> Iterator[None]:
    """These attributes of a thread's own place, as long as the context lasts."""
    vars(place).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(place)[name]


class Attention(RegionAttention):
    """Flux's attention for painting. Without gradients the fused kernel with a mask is the fastest at these lengths (on
    a CPU 15% of the whole forward)."""

    def __init__(self) -> None:
        super().__init__()
        self._of_thread = threading.local()

    def reading(self, gates: Tensor) -> AbstractContextManager[None]:
        """In this thread, the first half of a batch reads the image keys of the second, its sources, instead of its own, by
        gates [B, rows, cols] (kernels/gate.py)."""
        return within(self._of_thread, gates=gates)

    def under(self, regions: Regions) -> AbstractContextManager[None]:
        """In this thread, these regions in place of `regions`: one for each row, of which a block may see the first alone."""
        return within(self._of_thread, regions=regions)

    def beside(self, gates: Tensor, regions: Regions) -> AbstractContextManager[None]:
        """In this thread, the picture's patches read those of a reference behind them by gates [B, rows, cols]. regions: with
        rows of the reference's patches."""
        return within(self._of_thread, beside=gates, regions=regions)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        beside = getattr(self._of_thread, "beside", None)
        if beside is not None:
            return masked_attention(*before_reference(q, k, v, beside), self._of_thread.regions, "dense",
                                    source=reference_source(k, v, beside))
        gates = getattr(self._of_thread, "gates", None)
        if gates is None:
            return self._own(q, k, v)
        count, text = len(gates), q.shape[2] - gates[0].numel()
        source = Source(k[count:, :, text:], v[count:, :, text:], sequence_gate(gates, text, 0.0).to(q.device),
                        (text, q.shape[2]))
        read = masked_attention(q[:count], k[:count], v[:count], self.regions, "dense", source=source)
        return torch.cat([read, self._own(q[count:], k[count:], v[count:])])

    def _own(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        regions = getattr(self._of_thread, "regions", self.regions)
        if regions is None:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return masked_attention(q, k, v, regions.first(len(q)), "dense")
