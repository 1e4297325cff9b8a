"""Route *merge*: attend to the unmasked keys, the region tokens and a source apart, then join by log-sum-exps.

The unmasked part runs the fastest kernel that PyTorch has for the tensors; the region part needs a bias of [S, T] only.
No mask of the whole sequence exists anywhere. The join is that of FlashAttention's split keys (Dao et al. 2022) and of
ring attention (Liu et al. 2023): out = (1 - w) rest + w region with w = sigmoid(lse_region - lse_rest), and the source
likewise onto their join, its log-sum-exp shifted by the log of each query's gate.

Backward. The log-sum-exp that aten's kernels return carries no gradient, so autograd through the join would be silently
wrong. A key's probability under the joined softmax is exp(score - lse_joined), and the backward kernels recompute it
from the log-sum-exp that they are given: each part's own backward, called with the joined output and the joined
log-sum-exp, gives the exact gradients of the joined attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend

from .bias import Regions
from .source import Source

_aten = torch.ops.aten
_CPU, _FLASH, _EFFICIENT, _CUDNN = "cpu", "flash", "efficient", "cudnn"


class Kernels(NamedTuple):
    rest: str
    region: str


def kernels(q: Tensor, k: Tensor, v: Tensor, regions: Regions | None) -> Kernels | None:
    """The kernels for the parts, or None where one of them returns no log-sum-exp. A source takes that of the rest.

    On CUDA the unmasked part gets the kernel that `scaled_dot_product_attention` itself would take for these tensors.
    """
    if q.device.type == "cpu":
        usable = torch._fused_sdp_choice(q, k, v) == SDPBackend.FLASH_ATTENTION.value
        return Kernels(_CPU, _CPU) if usable else None
    # Heads that are no multiple of 8 wide are padded by scaled_dot_product_attention, not by its kernels.
    if q.device.type != "cuda" or q.shape[-1] % 8 or q.dtype == torch.float64:
        return None
    tokens = regions.tokens if regions else 0
    backend = torch._fused_sdp_choice(q, k[:, :, tokens:], v[:, :, tokens:])
    names = {
        SDPBackend.FLASH_ATTENTION.value: _FLASH,
        SDPBackend.EFFICIENT_ATTENTION.value: _EFFICIENT,
        SDPBackend.CUDNN_ATTENTION.value: _CUDNN,
    }
    return Kernels(names[backend], _EFFICIENT) if backend in names else None


def merge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Regions | None,
    chosen: Kernels | None = None,
    source: Source | None = None,
) -> Tensor:
    chosen = chosen or kernels(q, k, v, regions)
    if chosen is None:
        raise ValueError(
            f"No attention kernel on {q.device.type} returns the log-sum-exp for {q.dtype};"
            " take the route partition or dense."
        )
    part, shift = regions.relative(q.dtype) if regions else (None, None)
    if regions:
        part = part.expand(q.shape[0], q.shape[1], -1, -1)
    read = (source.keys, source.values, source.shift(q.dtype)) if source else (None, None, None)
    instead, own = (source.instead, source.own(q.dtype)) if source and source.instead else (None, None)
    inputs = (q, k, v, *read[:2])
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _Merge.apply(*inputs, part, shift, read[2], own, instead, chosen)
    return _forward(_parts(*inputs, part, shift, read[2], own, instead, chosen), q)[0]


class _Part(NamedTuple):
    """Keys that one kernel attends to, their bias, and the shift of every query towards all of them."""

    kernel: str
    keys: Tensor
    values: Tensor
    bias: Tensor | None
    shift: Tensor | None


def _parts(q, k, v, source_k, source_v, part, shift, gate, own, instead, chosen: Kernels) -> list[_Part]:
    """In the order of the keys: the region tokens, the rest, what the source stands in for, the rest behind it, the source;
    each where there is any."""
    tokens = 0 if part is None else part.shape[-1]
    first, last = instead or (k.shape[2], k.shape[2])
    parts = [] if part is None else [_Part(chosen.region, k[:, :, :tokens], v[:, :, :tokens], part, shift)]
    for start, end, towards in ((tokens, first, None), (first, last, own), (last, k.shape[2], None)):
        if start < end:
            parts.append(_Part(chosen.rest, k[:, :, start:end], v[:, :, start:end], None, towards))
    if source_k is not None:
        parts.append(_Part(chosen.rest, source_k, source_v, None, gate))
    return parts


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, source_k, source_v, part, shift, gate, own, instead, chosen: Kernels) -> Tensor:
        out, lse, results = _forward(_parts(q, k, v, source_k, source_v, part, shift, gate, own, instead, chosen), q)
        # The raw log-sum-exps are kept for their shape and padding only. They are saved like the rest: what is kept on
        # ctx itself would outlive gradient checkpointing.
        ctx.save_for_backward(
            q, k, v, source_k, source_v, part, shift, gate, own, out, lse, *(raw[1] for raw in results)
        )
        ctx.instead, ctx.chosen, ctx.extra = instead, chosen, [raw[2:] for raw in results]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        saved = ctx.saved_tensors  # under gradient checkpointing they can be read but once
        *inputs, out, lse = saved[:11]
        raws, q, source_k = saved[11:], inputs[0], inputs[3]
        grads = []
        for one, raw, extra in zip(_parts(*inputs, ctx.instead, ctx.chosen), raws, ctx.extra):
            # A part's scores lack its shift, so its log-sum-exp must lack it too.
            alone = lse if one.shift is None else lse - one.shift
            grads.append(_backward(one.kernel, grad, q, one.keys, one.values, one.bias, out, alone, (raw, *extra)))
        queries = sum((each[0] for each in grads[1:]), grads[0][0])
        from_source = grads.pop()[1:] if source_k is not None else (None, None)
        keys, values = (torch.cat(each, dim=2) if len(each) > 1 else each[0] for each in list(zip(*grads))[1:])
        return queries, keys, values, *from_source, *[None] * 6


def _forward(parts: list[_Part], q: Tensor):
    """Joined output, joined log-sum-exp and the raw results; one of the outputs is overwritten by the join."""
    results = [_attend(one.kernel, q, one.keys, one.values, one.bias) for one in parts]
    begin = next((place for place, one in enumerate(parts) if one.shift is None), 0)
    shifted = [_lse(result, q) + (0 if one.shift is None else one.shift) for one, result in zip(parts, results)]
    out, lse = results[begin][0], shifted[begin]
    for result, other in zip(results[:begin] + results[begin + 1 :], shifted[:begin] + shifted[begin + 1 :]):
        out = out.lerp_(result[0], torch.sigmoid(other - lse).unsqueeze(-1).to(q.dtype))
        lse = torch.logaddexp(lse, other)
    return out, lse, results


def _lse(result: tuple, q: Tensor) -> Tensor:
    """[B, H, S] of a kernel's log-sum-exp, which may be padded along S or have a last dimension of 1."""
    return result[1].view(*q.shape[:2], -1)[..., : q.shape[2]]


def _attend(kernel: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple:
    """(output, log-sum-exp, whatever else the kernel's backward wants)."""
    if kernel == _CPU:
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
    if kernel == _FLASH:
        return _aten._scaled_dot_product_flash_attention(q, k, v)
    if kernel == _CUDNN:
        return _aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True)
    return _aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)


def _backward(
    kernel: str,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    extra: tuple,
) -> tuple[Tensor, Tensor, Tensor]:
    raw, *extra = extra
    if kernel == _CPU:
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False, attn_mask=bias
        )
    # The other kernels want the log-sum-exp in the layout in which they made it, padding included.
    full = raw.clone()
    full.view(*q.shape[:2], -1)[..., : q.shape[2]] = lse
    if kernel == _FLASH:
        cum_q, cum_k, max_q, max_k, seed, offset, _ = extra
        return _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, full, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset
        )
    if kernel == _CUDNN:
        cum_q, cum_k, max_q, max_k, seed, offset, _ = extra
        return _aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, full, seed, offset, bias, cum_q, cum_k, max_q, max_k, 0.0, False
        )
    seed, offset = extra
    return _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, bias, out, full, seed, offset, 0.0, [True, True, True, False]
    )[:3]
