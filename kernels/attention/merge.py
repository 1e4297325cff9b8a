"""Route *merge*: attend to the unmasked keys and to the region tokens apart, then join the two by their log-sum-exps.

The unmasked part runs the fastest kernel that PyTorch has for the tensors; the region part needs a bias of [S, T] only.
No mask of the whole sequence exists anywhere. The join is that of FlashAttention's split keys (Dao et al. 2022) and of
ring attention (Liu et al. 2023): out = (1 - w) rest + w region with w = sigmoid(lse_region - lse_rest).

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

_aten = torch.ops.aten
_CPU, _FLASH, _EFFICIENT, _CUDNN = "cpu", "flash", "efficient", "cudnn"


class Kernels(NamedTuple):
    rest: str
    region: str


def kernels(q: Tensor, k: Tensor, v: Tensor, regions: Regions) -> Kernels | None:
    """The kernels for the two parts, or None where one of them returns no log-sum-exp.

    On CUDA the unmasked part gets the kernel that `scaled_dot_product_attention` itself would take for these tensors.
    """
    if q.device.type == "cpu":
        usable = torch._fused_sdp_choice(q, k, v) == SDPBackend.FLASH_ATTENTION.value
        return Kernels(_CPU, _CPU) if usable else None
    # Heads that are no multiple of 8 wide are padded by scaled_dot_product_attention, not by its kernels.
    if q.device.type != "cuda" or q.shape[-1] % 8 or q.dtype == torch.float64:
        return None
    backend = torch._fused_sdp_choice(q, k[:, :, regions.tokens :], v[:, :, regions.tokens :])
    names = {
        SDPBackend.FLASH_ATTENTION.value: _FLASH,
        SDPBackend.EFFICIENT_ATTENTION.value: _EFFICIENT,
        SDPBackend.CUDNN_ATTENTION.value: _CUDNN,
    }
    return Kernels(names[backend], _EFFICIENT) if backend in names else None


def merge_attention(q: Tensor, k: Tensor, v: Tensor, regions: Regions, chosen: Kernels | None = None) -> Tensor:
    chosen = chosen or kernels(q, k, v, regions)
    if chosen is None:
        raise ValueError(
            f"No attention kernel on {q.device.type} returns the log-sum-exp for {q.dtype};"
            " take the route partition or dense."
        )
    part, shift = regions.relative(q.dtype)
    part = part.expand(q.shape[0], q.shape[1], -1, -1)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Merge.apply(q, k, v, part, shift, chosen)
    return _forward(q, k, v, part, shift, chosen)[0]


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, part: Tensor, shift: Tensor, chosen: Kernels) -> Tensor:
        out, rest, region = _forward(q, k, v, part, shift, chosen)
        lse = torch.logaddexp(_lse(rest, q), _lse(region, q) + shift)
        # The raw log-sum-exps are kept for their shape and padding only. They are saved like the rest: what is kept on
        # ctx itself would outlive gradient checkpointing.
        ctx.save_for_backward(q, k, v, part, shift, out, lse, rest[1], region[1])
        ctx.chosen, ctx.rest, ctx.region = chosen, rest[2:], region[2:]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, part, shift, out, lse, raw_rest, raw_region = ctx.saved_tensors
        tokens = part.shape[-1]
        # The region part's scores lack the shift, so its log-sum-exp must lack it too.
        region_lse = lse - shift
        q_rest, k_rest, v_rest = _backward(
            ctx.chosen.rest, grad, q, k[:, :, tokens:], v[:, :, tokens:], None, out, lse, (raw_rest, *ctx.rest)
        )
        q_region, k_region, v_region = _backward(
            ctx.chosen.region, grad, q, k[:, :, :tokens], v[:, :, :tokens], part, out, region_lse,
            (raw_region, *ctx.region),
        )
        keys, values = torch.cat([k_region, k_rest], dim=2), torch.cat([v_region, v_rest], dim=2)
        return q_rest + q_region, keys, values, None, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, part: Tensor, shift: Tensor, chosen: Kernels):
    """Joined output and the raw results of the two kernels; the first one's output is overwritten by the join."""
    tokens = part.shape[-1]
    rest = _attend(chosen.rest, q, k[:, :, tokens:], v[:, :, tokens:], None)
    region = _attend(chosen.region, q, k[:, :, :tokens], v[:, :, :tokens], part)
    weight = torch.sigmoid(_lse(region, q) + shift - _lse(rest, q))
    out = rest[0].lerp_(region[0], weight.unsqueeze(-1).to(q.dtype))
    return out, rest, region


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
