"""The gate on reference latents that a model was trained to read (FLUX.1 Kontext): each patch reads them by its own.

Core puts the references' patches behind the picture's. Their keys are taken out of the sequence and read as a third part of
the softmax, every query by its gate (`kernels/attention/source.py`); the references among themselves as ever.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...kernels.attention import Source
from ...kernels.blocks import Blocks
from ...kernels.gate import reference_gate
from .companions import Forward
from .flux import check_model, within
from .gates import Opening, gates_of, opening_of, put_around, reading, watching_wrapper
from .override import OVERRIDE_KEY
from .watch import Watch

GATE_KEY = "sda_reference_gate"
WHAT = "Reference Gate"


class References:
    """What every attention of one forward needs to read the references. gates [B, rows, cols]; rows: of the batch."""

    watch: Watch | None = None  # of the forward, by `reading`

    def __init__(self, rows: int, gates: Tensor, text_gate: float, blocks: Blocks | None, previous: Callable | None) -> None:
        self.blocks, self.previous = blocks, previous
        self._gates, self._text_gate = gates.repeat(rows // len(gates), 1, 1), text_gate
        self._made: Source | None = None

    def read(self, q: Tensor, k: Tensor, v: Tensor, text: int) -> tuple[Tensor, Tensor, Tensor, Source]:
        """(queries, the other keys, their values, the references) for queries of the joint sequence: text, patches, references."""
        start = text + self._gates[0].numel()
        keys, values = k[:, :, start:], v[:, :, start:]
        if self._made is None or self._made.gate.shape[1] != q.shape[2]:
            gates = reference_gate(self._gates, text, self._text_gate, q.shape[2] - start)
            self._made = Source(keys, values, gates.to(q.device))
        return q, k[:, :, :start], v[:, :, :start], self._made.over(keys, values)


def patch(
    model, mask: Tensor | None = None, strength: float = 1.0, lo: float = 0.0, hi: float = 1.0, text_gate: float = 1.0,
    start: float = 0.0, end: float = 1.0, blocks: str = "all",
):  # fmt: skip
    """A clone of a Flux MODEL whose patches read its reference latents by a gate; 1 is as trained.

    mask: MASK, where the references are not to be read. The other settings are those of `kernels.gate` and of Masked
        Attention.
    """
    network = model.get_model_object("diffusion_model")
    check_model(model.model, network, WHAT)
    opening = opening_of(network, mask, strength, lo, hi, text_gate, start, end, blocks)
    patched = model.clone()

    def reads(gates: Tensor, forward: Forward) -> bool:
        as_trained = opening.text_gate == 1 and bool((gates == 1).all())
        return bool(forward.ref_latents) and not as_trained

    watching = watching_wrapper(WHAT, opening, reads)
    put_around(patched, GATE_KEY, gating_wrapper(model.model, opening, reads), watching)
    return patched


def gating_wrapper(base_model, opening: Opening, reads: Callable[[Tensor, Forward], bool]) -> Callable:
    """The DIFFUSION_MODEL wrapper. A function, not an object: core deep-copies model options on every clone."""

    def wrapper(
        executor, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None,
        transformer_options={}, **kwargs,  # noqa: B006  (core's own signature; never written to)
    ):  # fmt: skip
        forward = Forward(x, timestep, context, y, guidance, ref_latents, control, transformer_options, kwargs)
        if not ref_latents or not within(base_model, transformer_options, opening.start, opening.end):
            return forward.run(executor)
        gates = gates_of(opening, forward, executor.class_obj.patch_size)
        if not reads(gates, forward):
            return forward.run(executor)
        previous = transformer_options.get(OVERRIDE_KEY)
        reader = References(len(x), gates.to(x.device), opening.text_gate, opening.blocks, previous)
        return reading(forward, reader, executor.class_obj.patch_size).run(executor)

    return wrapper
