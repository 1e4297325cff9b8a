"""Right gradients through core's Flux, without touching any of its forwards.

Core's blocks add in place (`img += ...`). Plain autograd refuses that, and under gradient checkpointing, which runs a
block again from what were its inputs, it is silently wrong (23% by finite differences). And core loads weights in
inference mode, whose tensors autograd cannot save. So wherever a block runs, for the first time or again, a mode stands
that puts such additions out of place and hands autograd an ordinary view of such weights.

Everything is in a copy of the model options and in contexts: nothing is left on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from .override import OVERRIDE_KEY
from .watch import CORE_COMPILES, compiled

# PyTorch shows `a += b` as `a.add_(b)`. Python gives the name of the former to whatever this returns; a bare statement
# `a.add_(b)` would lose its addition. Core's Flux has none, and the check before a fit finds those of others, for the loss
# with gradients is then another than without. `addcmul_`, which rotary embeddings call for its effect, is no operator.
_OUT_OF_PLACE = {
    Tensor.add_: torch.add,
    Tensor.sub_: torch.sub,
    Tensor.mul_: torch.mul,
    Tensor.div_: torch.div,
}
_MULTIGPU = "multigpu_clones"  # core's: conditionings spread over several cards, without gradients


class Differentiable(TorchFunctionMode):
    """While it stands, what takes part in a gradient is not changed in place and is not an inference tensor.

    Nothing else is touched: a LoRA is added to a slice of a weight in place, and must be.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and any(_requires_grad(each) for each in (*args, *kwargs.values())):
            args = [_saveable(each) for each in args]
            kwargs = {name: _saveable(each) for name, each in kwargs.items()}
            if func in _OUT_OF_PLACE:
                return _OUT_OF_PLACE[func](*args, **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)


def _requires_grad(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, (list, tuple)) and any(_requires_grad(each) for each in value)


def _saveable(value: Any) -> Any:
    """An inference tensor as an ordinary one that shares its storage; anything else as it is.

    Subclasses (quantised weights) are left alone: their own operations make what autograd sees.
    """
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or not value.is_inference():
            return value
        ordinary = torch.empty(0, dtype=value.dtype, device=value.device)
        return ordinary.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())
    if type(value) in (list, tuple):
        return type(value)(_saveable(each) for each in value)
    return value


@contextmanager
def differentiable() -> Iterator[None]:
    """The context of a fit: gradients on, inference mode off, and core told that it trains.

    Newer cores then take a rotary embedding and quantised layers that have a backward.
    """
    core = comfy.model_management
    told = getattr(core, "in_training", None)
    try:
        if told is not None:
            core.in_training = True
        with torch.inference_mode(False), torch.enable_grad(), Differentiable():
            yield
    finally:
        if told is not None:
            core.in_training = told


def differentiable_options(model_options: dict, network: nn.Module, recompute: bool = True) -> dict:
    """Model options under which a Flux network has right gradients; those given are not changed.

    recompute: keep only what enters each block, and run the block again for its gradients. Needs little memory and a
        third more time.
    The attention is PyTorch's, whatever kernel stands there: SageAttention and others have no backward. Core's own
    compiled blocks are left out; ValueError for a network compiled otherwise.
    """
    options = comfy.model_patcher.create_model_options_clone(model_options)
    options.pop(_MULTIGPU, None)
    inner = options.setdefault("transformer_options", {})
    inner.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).pop(CORE_COMPILES, None)
    if compiled(network, inner):
        raise ValueError(
            "A compiled model has no gradients for a fit: connect the model from before the node that compiles it."
        )
    inner[OVERRIDE_KEY] = _exact_attention
    if recompute:
        replaced = inner.setdefault("patches_replace", {}).setdefault("dit", {})
        for kind, blocks, run in (
            ("double_block", network.double_blocks, _run_double),
            ("single_block", network.single_blocks, _run_single),
        ):
            for index, block in enumerate(blocks):
                replaced[kind, index] = _recomputed(block, run, replaced.get((kind, index)))
    return options


def _exact_attention(func, *args, **kwargs):
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def _recomputed(block: nn.Module, run: Callable, previous: Callable | None) -> Callable:
    """A replacement for core's call of one block that keeps its inputs only.

    The block is called by us: core's `original_block` names the block that its loop has come to, which after the
    forward is the last one. `previous`: the replacement that another pack has put there; it is called inside.
    """

    def call(args: dict) -> dict:
        return run(block, args)

    def replacement(args: dict, _: dict) -> dict:
        # Core writes into these which block it is in; a block that runs again must find its own.
        args = {**args, "transformer_options": dict(args["transformer_options"])}

        def forward(args: dict) -> dict:
            with Differentiable():
                return call(args) if previous is None else previous(args, {"original_block": call})

        # Nothing in a block is random.
        return checkpoint(forward, args, use_reentrant=False, preserve_rng_state=False)

    return replacement


def _run_double(block: nn.Module, args: dict) -> dict:
    img, txt = block(
        img=args["img"], txt=args["txt"], vec=args["vec"], pe=args["pe"], attn_mask=args.get("attn_mask"),
        transformer_options=args["transformer_options"],
    )  # fmt: skip
    return {"img": img, "txt": txt}


def _run_single(block: nn.Module, args: dict) -> dict:
    img = block(
        args["img"], vec=args["vec"], pe=args["pe"], attn_mask=args.get("attn_mask"),
        transformer_options=args["transformer_options"],
    )  # fmt: skip
    return {"img": img}
