"""The Flux patch: region tokens are seen only where their boxes are, without touching any of core's forwards.

One keyed DIFFUSION_MODEL wrapper on a clone of the model. It takes the layout out of the conditioning, and while it
runs, and only in a copy of `transformer_options`, an attention override is in place; an override of another pack that
was there before is called by ours. Without a layout, or where every token is seen as trained, core runs as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import comfy.ldm.flux.model
import comfy.model_base
import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels import layout as layout_codec
from ...kernels.attention import Regions, masked_attention
from ...kernels.blocks import Blocks, parse_blocks
from ...kernels.visibility import patch_grid, region_bias
from .conditioning import LAYOUT_KEY, MASKS_KEY

WRAPPER_KEY = "semantic_diffusion_adapter"
# Of FLUX.1's network class, with other text and other patches; cores before it do not know it.
_FLUX2 = getattr(comfy.model_base, "Flux2", ())
# Core's own exact attention functions; any other (SageAttention, flash, xformers) was asked for by the user and is kept.
_EXACT = {"attention_pytorch", "attention_basic", "attention_split", "attention_sub_quad"}


def patch(model, strength: float = 1.0, start: float = 0.0, end: float = 1.0, mixing: str = "all", blocks: str = "all"):
    """A clone of a Flux MODEL under which layouts are obeyed.

    strength: factor on the weight of all region tokens, 0 = off, 1 = as trained (adds ln(strength) to the logits).
    start, end: part of the sampling in which the patch works, by the sigmas of the model's own schedule; outside of it
        every query sees every region token.
    mixing: "all" or "overlap", which region tokens see one another.
    blocks: in which blocks (`parse_blocks`); in the others every query sees every region token, at no strength.
    """
    network = model.get_model_object("diffusion_model")
    if not isinstance(network, comfy.ldm.flux.model.Flux) or isinstance(model.model, _FLUX2):
        raise ValueError(
            f"Masked Attention works on FLUX.1 models and this is {type(model.model.model_config).__name__}: load a FLUX.1 "
            "model with Load Diffusion Model."
        )
    if not strength >= 0:
        raise ValueError(f"The strength must be 0 (off) or more, not {strength}.")
    check_times(start, end)
    chosen = parse_blocks(blocks, len(network.double_blocks), len(network.single_blocks))
    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, WRAPPER_KEY)  # a second patch replaces the first
    log_strength = math.log(strength) if strength > 0 else -math.inf
    wrapper = layout_wrapper(model.model, log_strength, start, end, mixing, chosen)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, WRAPPER_KEY, wrapper)
    return patched


def check_times(start: float, end: float) -> None:
    if not 0 <= start <= end <= 1:
        raise ValueError(f"start_percent ({start}) must not be after end_percent ({end}), both in 0 to 1: swap them.")


def layout_wrapper(
    base_model, log_strength: float, start: float, end: float, mixing: str, blocks: Blocks | None
) -> Callable:
    """The DIFFUSION_MODEL wrapper. A function, not an object: core deep-copies model options on every clone."""

    def wrapper(
        executor, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None,
        transformer_options={}, **kwargs,  # noqa: B006  (core's own signature; never written to)
    ):  # fmt: skip
        layout, masks = kwargs.pop(LAYOUT_KEY, None), kwargs.pop(MASKS_KEY, None)
        if layout is not None and _active(base_model, transformer_options, start, end):
            _check(executor.class_obj, layout, context, y)
            patch_size = executor.class_obj.patch_size
            regions = prepare(layout, x, context, ref_latents, patch_size, log_strength, mixing, masks)
            if not regions.trivial:
                previous = transformer_options.get("optimized_attention_override")
                override = regional_attention(regions, previous, blocks)
                transformer_options = {**transformer_options, "optimized_attention_override": override}
        return executor(x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs)

    return wrapper


def prepare(
    layout: Tensor, x: Tensor, context: Tensor, references, patch: int, log_strength: float, mixing: str,
    masks: Tensor | None = None,
) -> Regions:  # fmt: skip
    """The regions of one forward: the latent's real patch grid, the text and reference tokens that it will have."""
    if masks is not None:
        masks = masks.to(x.device)
    boxes, strengths, masks, masked_by = layout_codec.decode(layout.to(x.device), masks)
    grids = [patch_grid(*latent.shape[-2:], patch) for latent in (x, *(references or ()))]
    extra = sum(rows * cols for rows, cols in grids[1:])
    return Regions(region_bias(boxes, strengths + log_strength, grids[0], context.shape[1], extra, mixing, masks, masked_by))


def regional_attention(regions: Regions, previous: Callable | None, blocks: Blocks | None = None) -> Callable:
    """An `optimized_attention_override` that masks the joint attention and calls `previous` for the attention itself.

    blocks: only in these; None for all, also where core does not say which block it is.
    """

    def override(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
        def host(q, k, v, **more):
            arguments = {"attn_precision": attn_precision, **more, **kwargs}
            return func(q, k, v, heads, **arguments) if previous is None else previous(func, q, k, v, heads, **arguments)

        sequence = 2 if skip_reshape else 1
        elsewhere = blocks is not None and not _among(blocks, kwargs.get("transformer_options"))
        if elsewhere or q.shape[sequence] != regions.length or k.shape[sequence] != regions.length:
            return host(q, k, v, mask=mask, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
        if not skip_reshape:
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))

        def plain(q, k, v):
            # In the shape that Flux itself asks for, which every pack's override knows.
            return host(q, k, v, mask=None, skip_reshape=True).unflatten(-1, (heads, -1)).transpose(1, 2)

        if mask is not None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=_with_mask(regions, mask, q))
        else:
            keep = previous is not None or getattr(func, "__name__", "") not in _EXACT
            out = masked_attention(q, k, v, regions, plain=plain, keep_plain=keep)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    return override


def _among(blocks: Blocks, transformer_options: dict | None) -> bool:
    """Is this attention in one of the blocks? Core writes where it is while it goes through them."""
    here = transformer_options or {}
    return "block_index" not in here or (here.get("block_type"), here["block_index"]) in blocks


def _with_mask(regions: Regions, mask: Tensor, q: Tensor) -> Tensor:
    """Our bias added to a mask of the whole sequence that the conditioning brought along (a style model's)."""
    mask = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask.float()
    while mask.ndim < 4:
        mask = mask.unsqueeze(0 if mask.ndim == 2 else 1)
    full = mask.expand(max(mask.shape[0], regions.batch), -1, regions.length, regions.length).clone()
    full[..., : regions.tokens] += regions.bias.unsqueeze(1)
    return full.to(q.dtype)


def _active(base_model, transformer_options: dict, start: float, end: float) -> bool:
    sigmas = transformer_options.get("sigmas")
    if sigmas is None or (start == 0 and end == 1):
        return True
    # Asked at sampling time: a node after ours may have changed the model's schedule.
    schedule = base_model.model_sampling
    return schedule.percent_to_sigma(start) >= float(sigmas.max()) > schedule.percent_to_sigma(end)


def _check(network, layout: Tensor, context: Tensor, y: Tensor | None) -> None:
    params = network.params
    if context.shape[-1] != params.context_in_dim:
        raise ValueError(
            f"The embedding has width {context.shape[-1]} and this model reads {params.context_in_dim}: "
            "use an adapter that was trained for this model."
        )
    if context.shape[1] < layout.shape[1]:
        raise ValueError(
            f"The conditioning has {context.shape[1]} tokens but a layout of {layout.shape[1]}: another node cut it, "
            "connect Embedding to Conditioning directly."
        )
    if y is not None and params.vec_in_dim is not None and y.shape[-1] < params.vec_in_dim:
        raise ValueError(
            f"The pooled vector has width {y.shape[-1]} and this model reads {params.vec_in_dim}: "
            "take text and adapter from the same model."
        )
