"""Gates: how far every patch, and the text, reads what is not its own; what the source's gate and the references' share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.area import resample
from ...kernels.attention import Regions
from ...kernels.blocks import Blocks, parse_blocks
from ...kernels.gate import gate, sequence_gate
from ...kernels.visibility import patch_grid
from .companions import Forward
from .flux import WRAPPER_KEY, check_times, within
from .override import OVERRIDE_KEY, READER_KEY, regional_attention
from .sequence import Sequence
from .watch import Missed, compiled, watched

GATE_WATCH_KEY = "sda_gate_watch"


class Opening(NamedTuple):
    """How far the gate of every patch and of the text stands open, when and where. change: MASK [B or 1, H, W], 1 = may
    change, or None."""

    change: Tensor | None
    strength: float
    lo: float
    hi: float
    text_gate: float
    start: float
    end: float
    blocks: Blocks | None


def opening_of(network, mask, strength, lo, hi, text_gate, start, end, blocks: str) -> Opening:
    """ValueError for what is out of range."""
    check_times(start, end)
    sequence_gate(gate(torch.zeros(1, 1, 1), strength, lo, hi), 0, text_gate)
    chosen = parse_blocks(blocks, len(network.double_blocks), len(network.single_blocks))
    return Opening(mask, strength, lo, hi, text_gate, start, end, chosen)


def put_around(patched, key: str, wrapper: Callable, watching: Callable | None = None) -> None:
    """Add a DIFFUSION_MODEL wrapper around Masked Attention, which then finds the rows and the reader of a gate; and the
    APPLY_MODEL wrapper that watches it, if there is one."""
    patched.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, key)
    if watching is not None:
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, watching)
    patched.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, key)
    inner = list(patched.get_wrappers(WrappersMP.DIFFUSION_MODEL, WRAPPER_KEY))
    patched.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, WRAPPER_KEY)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, wrapper)
    for each in inner:
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, WRAPPER_KEY, each)


def watching_wrapper(what: str, opening: Opening, reads: Callable[[Tensor, Forward], bool]) -> Callable:
    """The APPLY_MODEL wrapper: a gate that reads and yet does not come to a block is one sentence, not a picture without it.

    reads: whether anything is read by such gates in such a forward.
    """

    def wrapper(
        executor, x, t, c_concat=None, c_crossattn=None, control=None,
        transformer_options={}, **kwargs,  # noqa: B006  (core's own signature; never written to)
    ):  # fmt: skip
        base_model = executor.class_obj
        network = base_model.diffusion_model

        def open_now() -> bool:
            forward = Forward(x, t, c_crossattn, None, None, kwargs.get("ref_latents"), control, transformer_options, kwargs)
            return reads(gates_of(opening, forward, network.patch_size), forward)

        options = transformer_options
        if within(base_model, options, opening.start, opening.end) and not compiled(network, options):
            missed = Missed("The gate does", what)
            with watched(network, opening.blocks, options, open_now, missed) as watch:
                return executor(x, t, c_concat, c_crossattn, control, {**options, GATE_WATCH_KEY: watch}, **kwargs)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    return wrapper


def check_ends(lo: float, hi: float) -> None:
    gate(torch.zeros(1, 1, 1), 1.0, lo, hi)


def reading(forward: Forward, reader: Any, patch_size: int) -> Forward:
    """The forward with an attention override that reads; Masked Attention, if it is there, takes the reader over. ValueError
    where another gate reads already: one of the two would be lost without a word."""
    if READER_KEY in forward.transformer_options:
        raise ValueError("Source Gate and Reference Gate do not work on one model together: remove one of the two.")
    grids = [patch_grid(*each.shape[-2:], patch_size) for each in (forward.x, *(forward.ref_latents or ()))]
    patches, *others = (rows * cols for rows, cols in grids)

    def unmasked(text: int, references: int) -> Regions:
        return Regions(torch.zeros(text + patches + references, 1, device=forward.x.device))

    sequence = Sequence(unmasked, forward.context.shape[1], patches, sum(others))
    reader.watch = forward.transformer_options.get(GATE_WATCH_KEY)
    override = regional_attention(sequence, reader.previous, blocks=frozenset(), reader=reader)
    options = {**sequence.follow(forward.transformer_options), OVERRIDE_KEY: override, READER_KEY: reader}
    return forward._replace(transformer_options=options)


def gates_of(opening: Opening, forward: Forward, patch_size: int) -> Tensor:
    """[B, rows, cols] float32 on the CPU: the gate of every latent patch of every picture."""
    count, grid = forward.pictures, patch_grid(*forward.x.shape[-2:], patch_size)
    change = torch.zeros(1, *grid) if opening.change is None else resample(opening.change.float().cpu(), *grid)
    if len(change) not in (1, count):
        raise ValueError(f"The gate has {len(change)} masks for {count} pictures: give one, or one for each.")
    return gate(change.clamp(0, 1), opening.strength, opening.lo, opening.hi).expand(count, -1, -1)
