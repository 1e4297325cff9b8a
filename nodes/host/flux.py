"""The Flux patch: region tokens are seen only where their boxes are, without touching any of core's forwards.

Two keyed wrappers stand on a clone of the model. The DIFFUSION_MODEL wrapper takes the layout out of the conditioning.
While it runs, an attention override is in place, in a copy of `transformer_options` only; it calls the override of
another pack that was there before. Without a layout, or where every token is seen as trained, core runs as it is.
The APPLY_MODEL wrapper around it checks that every block that runs came to the override (`watch`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import comfy.ldm.flux.model
import comfy.model_base
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels import layout as layout_codec
from ...kernels.attention import Regions
from ...kernels.blocks import Blocks, parse_blocks
from ...kernels.visibility import patch_grid, region_bias
from .conditioning import LAYOUT_KEY, MASKS_KEY
from .override import OVERRIDE_KEY, READER_KEY, regional_attention
from .sequence import Sequence
from .watch import WATCH_KEY, compiled, watched

WRAPPER_KEY = "semantic_diffusion_adapter"
# Of FLUX.1's network class, with other text and other patches; cores before it do not know it.
_FLUX2 = getattr(comfy.model_base, "Flux2", ())


class Settings(NamedTuple):
    """What the patch was asked for, as the wrappers read it."""

    log_strength: float
    start: float
    end: float
    mixing: str
    blocks: Blocks | None


def patch(model, strength: float = 1.0, start: float = 0.0, end: float = 1.0, mixing: str = "all", blocks: str = "all"):
    """A clone of a Flux MODEL under which layouts are obeyed.

    strength: factor on the weight of all region tokens, 0 = off, 1 = as trained (adds ln(strength) to the logits).
    start, end: part of the sampling in which the patch works, by the sigmas of the model's own schedule; outside of it
        every query sees every region token.
    mixing: "all" or "overlap", which region tokens see one another.
    blocks: in which blocks (`parse_blocks`); in the others every query sees every region token, at no strength.
    """
    network = model.get_model_object("diffusion_model")
    check_model(model.model, network)
    if not strength >= 0:
        raise ValueError(f"The strength must be 0 (off) or more, not {strength}.")
    check_times(start, end)
    chosen = parse_blocks(blocks, len(network.double_blocks), len(network.single_blocks))
    log_strength = math.log(strength) if strength > 0 else -math.inf
    settings = Settings(log_strength, start, end, mixing, chosen)
    patched = model.clone()
    for kind, wrapper in (
        (WrappersMP.APPLY_MODEL, watching_wrapper(settings)),
        (WrappersMP.DIFFUSION_MODEL, layout_wrapper(model.model, settings)),
    ):
        patched.remove_wrappers_with_key(kind, WRAPPER_KEY)  # a second patch replaces the first
        patched.add_wrapper_with_key(kind, WRAPPER_KEY, wrapper)
    return patched


def check_times(start: float, end: float) -> None:
    if not 0 <= start <= end <= 1:
        raise ValueError(f"start_percent ({start}) must not be after end_percent ({end}), both in 0 to 1: swap them.")


def check_model(base_model, network, what: str = "Masked Attention") -> None:
    """ValueError unless it is FLUX.1, whose text has no order: region tokens come before it and may be any number."""
    kind = type(base_model.model_config).__name__
    if isinstance(network, comfy.ldm.flux.model.Flux) and not isinstance(base_model, _FLUX2):
        if not getattr(network.params, "txt_ids_dims", None):
            return
        if kind == "Flux":  # core has no class of its own for it
            ovis = getattr(network.params, "txt_norm", False)
            kind = "Ovis-Image" if ovis else "a relative of it whose text has positions, such as LongCat-Image"
    raise ValueError(
        f"{what} works on FLUX.1 models and this is {kind}: load a FLUX.1 model with Load Diffusion Model."
    )


def layout_wrapper(base_model, settings: Settings) -> Callable:
    """The DIFFUSION_MODEL wrapper. A function, not an object: core deep-copies model options on every clone."""

    def wrapper(
        executor, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None,
        transformer_options={}, **kwargs,  # noqa: B006  (core's own signature; never written to)
    ):  # fmt: skip
        layout, masks = kwargs.pop(LAYOUT_KEY, None), kwargs.pop(MASKS_KEY, None)
        network = executor.class_obj
        if layout is not None:
            _check(network, layout, context, y)
            layout, context = _now(layout, context, base_model, transformer_options)
        if layout is not None and within(base_model, transformer_options, settings.start, settings.end):
            sequence = prepare(layout, x, context, ref_latents, network.patch_size, settings, masks)
            if not sequence.regions.trivial:
                previous, watch, reader = (transformer_options.get(key) for key in (OVERRIDE_KEY, WATCH_KEY, READER_KEY))
                previous = reader.previous if reader is not None else previous  # whose own override this one replaces
                override = regional_attention(sequence, previous, settings.blocks, watch, reader)
                transformer_options = {**sequence.follow(transformer_options), OVERRIDE_KEY: override}
        return executor(x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs)

    wrapper.settings = settings  # for the companions of other nodes
    return wrapper


def watching_wrapper(settings: Settings) -> Callable:
    """The APPLY_MODEL wrapper. Outside of the network's own forward, for a pack may have replaced that and with it the
    place where the other wrapper would be called."""

    def wrapper(
        executor, x, t, c_concat=None, c_crossattn=None, control=None,
        transformer_options={}, **kwargs,  # noqa: B006  (core's own signature; never written to)
    ):  # fmt: skip
        def run(transformer_options):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

        layout, network = kwargs.get(LAYOUT_KEY), executor.class_obj.diffusion_model
        active = layout is not None and within(executor.class_obj, transformer_options, settings.start, settings.end)
        if not active or compiled(network, transformer_options):
            return run(transformer_options)

        @functools.cache
        def masks() -> bool:
            now, text = _now(layout, c_crossattn, executor.class_obj, transformer_options)
            sequence = prepare(now, x, text, None, network.patch_size, settings, kwargs.get(MASKS_KEY))
            return not sequence.regions.trivial

        with watched(network, settings.blocks, transformer_options, masks) as watch:
            return run({**transformer_options, WATCH_KEY: watch})

    return wrapper


def prepare(
    layout: Tensor, x: Tensor, context: Tensor, references, patch: int, settings: Settings, masks: Tensor | None = None
) -> Sequence:
    """The sequence of one forward: the latent's real patch grid, the text and reference tokens that it will have."""
    boxes, strengths, masks, masked_by = layout_codec.decode(layout.cpu(), None if masks is None else masks.cpu())
    grids = [patch_grid(*latent.shape[-2:], patch) for latent in (x, *(references or ()))]
    patches, *others = (rows * cols for rows, cols in grids)
    strengths = strengths + settings.log_strength

    def make(text: int, references: int) -> Regions:
        bias = region_bias(boxes, strengths, grids[0], text, references, settings.mixing, masks, masked_by)
        return Regions(bias.to(x.device))

    return Sequence(make, context.shape[1], patches, sum(others))


def _now(layout: Tensor, context: Tensor, base_model, transformer_options: dict) -> tuple[Tensor, Tensor]:
    """(layout on the CPU, context) without the tokens whose schedule has them off at the forward's sigma."""
    return layout_codec.at_time(
        layout.cpu(), context, lambda start, end: within(base_model, transformer_options, start, end)
    )


def within(base_model, transformer_options: dict, start: float, end: float) -> bool:
    """Whether the forward's sigma lies in this part of the sampling."""
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
