"""Are the kernels that *merge* calls right on this machine? A small case against *dense* in float64, once for each.

PyTorch's kernels differ by device and version (ROCm calls itself `cuda` too), and a log-sum-exp that means something
else would give a plausible, wrong picture or gradient.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import merge
from .bias import Regions
from .dense import dense_attention
from .source import Source

# {(kernels, device, dtype, head width, with gradients): do they agree?}
_verdicts: dict[tuple, bool] = {}


def agrees(chosen: merge.Kernels, q: Tensor, gradients: bool) -> bool:
    """Whether *merge* may be taken with these kernels on tensors such as q. The first no is logged.

    gradients: the backward is compared as well.
    """
    if isinstance(q, FakeTensor):  # somebody plans memory or shapes, and there may be no such device
        return True
    key = (chosen, q.device, q.dtype, q.shape[-1], gradients)
    if key not in _verdicts:
        # In a thread of its own: autocast, inference mode, grad mode and the hooks of gradient checkpointing, all of
        # which would get in its way or be disturbed by it, are the calling thread's.
        with ThreadPoolExecutor(1) as thread:
            wrong = thread.submit(_compare, *key).result()
        _verdicts[key] = wrong is None
        if wrong is not None:
            logging.warning(
                "Masked attention: PyTorch %s's kernels %s on %s in %s do not agree with the dense reference (%s), so "
                "another route is taken: the same result, more slowly.",
                torch.__version__, "+".join(chosen), q.device, str(q.dtype).removeprefix("torch."), wrong,
            )  # fmt: skip
    return _verdicts[key]


def _compare(
    chosen: merge.Kernels, device: torch.device, dtype: torch.dtype, width: int, gradients: bool
) -> str | None:
    """None where they agree, alone and with a source to read, else how they differ."""
    bias, gate, *inputs = _case(width)
    inputs = [tensor.to(dtype) for tensor in inputs]

    def attend(q: Tensor, k: Tensor, v: Tensor, regions: Regions, source: Source | None) -> Tensor:
        return merge.merge_attention(q, k, v, regions, chosen, source)

    # Wide enough for TF32 and half precision; a wrong weight of a hidden token or a wrong backward is far outside.
    tolerance = max(8 * torch.finfo(dtype).eps, 5e-3)
    for own in (None, gate):
        expected = _results(dense_attention, [t.double() for t in inputs], bias, own, gradients)
        try:
            here = own if own is None else own.to(device)
            got = _results(attend, [t.to(device) for t in inputs], bias.to(device), here, gradients)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # no such kernel in this build
            return str(error).splitlines()[0]
        for name, one, other in zip(("output", "dq", "dk", "dv", "dk of a source", "dv of a source"), got, expected):
            difference = (one.double().cpu() - other).abs().max().item()
            if not difference <= tolerance * max(1.0, other.abs().max().item()):  # NaN is a difference too
                return f"{name} differs by {difference:.2g}"
    return None


def _case(width: int) -> tuple[Tensor, ...]:
    """bias [75, 20]; gate [75]; q, k, v, a source's keys and values and the output's gradient, [2, 2, 75, width] float32.
    No size is a multiple of a kernel's block; tokens are hidden and weakened, and some queries see none; some read
    nothing of the source, some half and some twice."""
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(75, 20, generator=generator)
    bias[torch.rand(75, 20, generator=generator) < 0.5] = -torch.inf
    bias[30:40] = -torch.inf
    gate = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0]).repeat(15)
    return bias, gate, *(torch.randn(2, 2, 75, width, generator=generator) for _ in range(6))


def _results(attend, inputs: list[Tensor], bias: Tensor, gate: Tensor | None, gradients: bool) -> list[Tensor]:
    """[output], or [output, dq, dk, dv] and, with a gate, those of the source's keys and values."""
    *inputs, grad = [tensor.requires_grad_(gradients) for tensor in inputs]
    q, k, v, keys, values = inputs
    out = attend(q, k, v, Regions(bias), None if gate is None else Source(keys, values, gate))
    if not gradients:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, inputs if gate is not None else inputs[:3], grad)]
