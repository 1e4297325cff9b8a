"""diffusers' Flux that reads a source picture's patches by a gate: the same kernel as the node Reference Gate."""
from __future__ import annotations

from diffusers import FluxTransformer2DModel
from torch import Tensor

from ...kernels.attention import Source, masked_attention
from ...kernels.gate import reference_gate
from .region_attention import SHORT, RegionAttention


class GatedAttention(RegionAttention):
    """Attention processor of a Flux whose sequence is [text; patches; patches of a reference, as many].

    `gates` [B, rows, cols] in 0..2 say how strongly each patch reads the reference. The text does not read it: every patch reads
    the text, so the source would come through it. The reference reads everything. None: there is no reference. `regions`
    then have a row for each of the reference's patches too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._gates: Tensor | None = None
        self._made: Source | None = None

    @property
    def gates(self) -> Tensor | None:
        return self._gates

    @gates.setter
    def gates(self, gates: Tensor | None) -> None:
        self._gates, self._made = gates, None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._gates is None:
            return super().attend(q, k, v)
        self._made = reference_source(k, v, self._gates, self._made)
        route = "dense" if q.shape[2] <= SHORT else "auto"
        return masked_attention(*before_reference(q, k, v, self._gates), self.regions, route, source=self._made)


def before_reference(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All queries, and the keys and values [B, H, L, d] of what is no reference."""
    start = k.shape[2] - gates[0].numel()
    return q, k[:, :, :start], v[:, :, :start]


def reference_source(k: Tensor, v: Tensor, gates: Tensor, made: Source | None = None) -> Source:
    """The reference's keys and values at the end of the sequence, read by gates [B, rows, cols]. made: that of an earlier block of
    the same forward, whose gate need not be read back from the device again."""
    patches = gates[0].numel()
    start = k.shape[2] - patches
    keys, values = k[:, :, start:], v[:, :, start:]
    if made is None:
        made = Source(keys, values, reference_gate(gates, start - patches, 0.0, patches).to(k.device))
    return made.over(keys, values)


def attend_by_gate(flux: FluxTransformer2DModel) -> GatedAttention:
    """Put one shared GatedAttention into every block; set its `.regions` and `.gates` before a forward."""
    processor = GatedAttention()
    flux.set_attn_processor(processor)
    return processor
