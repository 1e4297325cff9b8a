"""How much memory a fit needs on its device, by the widths of the Flux alone.

Counted in units of one tensor [tokens, hidden] in the dtype of the computation. What autograd keeps of one block was
counted on core's Flux with `saved_tensors_hooks` (14 and 12 units of a double and a single block, 18 and 14 with the
pooled vector fitted too); what comes and goes while a block runs backwards is estimated from its widest tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

_KEPT_DOUBLE, _KEPT_SINGLE = 18, 14
_PASSING = 16  # gradients of the widest tensors, rotary embeddings in float32
# Weights of one block, in hidden x hidden.
_WEIGHTS_DOUBLE, _WEIGHTS_SINGLE = 36, 15


@dataclass(frozen=True)
class FluxSize:
    hidden: int
    double: int
    single: int


FLUX1 = FluxSize(hidden=3072, double=19, single=38)


@dataclass(frozen=True)
class FitMemory:
    """Bytes. weights: the model's, as stored; kept: what stays from forward to backward; working: of one block."""

    weights: int
    kept: int
    working: int

    @property
    def gradients(self) -> int:
        """What a fit needs beside the model."""
        return self.kept + self.working

    @property
    def total(self) -> int:
        return self.weights + self.gradients


def fit_memory(
    size: FluxSize, weights: int, tokens: int, itemsize: int = 2, cast: bool = False, recompute: bool = True
) -> FitMemory:
    """The memory of a fit of `tokens` in all: (text + patches) times pictures, of which 512 x 512 pixels have 1,024.

    weights: bytes of the model as stored, about 11.9e9 of FLUX.1-dev in fp8.
    itemsize: bytes of a number in the dtype of the computation.
    cast: whether the weights are stored in another dtype, so that autograd keeps cast copies of them.
    recompute: whether only the inputs of a block are kept and the block runs again for its gradients.
    """
    unit, square = tokens * size.hidden * itemsize, size.hidden**2 * itemsize
    working = (_KEPT_DOUBLE + _PASSING) * unit
    copies = _WEIGHTS_DOUBLE * square
    if recompute:
        kept = (size.double + size.single + 1) * unit
    else:
        kept = (size.double * _KEPT_DOUBLE + size.single * _KEPT_SINGLE) * unit
        copies = (size.double * _WEIGHTS_DOUBLE + size.single * _WEIGHTS_SINGLE) * square
    return FitMemory(weights, kept, working + (copies if cast else 0))
