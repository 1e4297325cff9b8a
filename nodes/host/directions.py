"""Attribute edits in the attention of a MODEL (FluxSpace, arXiv 2412.09611), by companions and hooks on the modules.

Beside every positive conditioning stand companions that share its image stream: one for each edit's prompt and one for the
empty prompt. After the projection of a double block's attention all of them go on with the steered output of the painted
row, so the streams stay one. The single blocks run without companions. The hooks live for one forward; the arithmetic is
that of `kernels.directions`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.area import resample
from ...kernels.blocks import Blocks, parse_blocks
from ...kernels.directions import coarse
from ...kernels.steering import Push, Steering
from ...kernels.visibility import patch_grid
from . import reference_gate, source_gate
from .companions import Companion, Forward, Row, accompanied, companion_of, evaluate, obeyed
from .flux import check_model, check_times, within
from .gates import put_around
from .source import check_flow
from .steering import hooked
from .watch import compiled

DIRECTIONS_KEY = "sda_directions"
RECORD_KEY = "sda_relevance"
WHAT = "Attribute Edit"


class Direction(NamedTuple):
    """One attribute. strength: the paper's raw factor, or with `bounded` the share of the attention's output that is added.
    region: MASK [B or 1, H, W], where it acts, or None."""

    edit: Companion
    empty: Companion
    strength: float
    bounded: bool
    coarse: float
    threshold: float
    start: float
    end: float
    blocks: Blocks | None
    region: Tensor | None


def patch(
    model, edit: list, empty: list, strength: float, bounded: bool = True, coarse: float = 0.0, threshold: float = 0.5,
    start: float = 0.0, end: float = 1.0, blocks: str = "all", region: Tensor | None = None,
):  # fmt: skip
    """A clone of a Flux MODEL that pushes what it paints along one attribute more; asked again, along several.

    edit, empty: the attribute's bare prompt and the empty prompt, CONDITIONINGs of one entry. The rest is `Direction`'s.
    ValueError for what is out of range, and for another model than FLUX.1.
    """
    network = model.get_model_object("diffusion_model")
    check_model(model.model, network, WHAT)
    check_flow(model, WHAT)
    check_times(start, end)
    check(strength, coarse, threshold)
    chosen = parse_blocks(blocks, len(network.double_blocks), 0)
    direction = Direction(
        companion_of(edit, WHAT), companion_of(empty, WHAT), strength, bounded, coarse, threshold, start, end, chosen, region
    )
    known = (*(model.get_attachment(DIRECTIONS_KEY) or ()), direction)
    patched = model.clone()
    patched.set_attachments(DIRECTIONS_KEY, known)
    put_around(patched, DIRECTIONS_KEY, steering_wrapper(model.model, known))
    return patched


def check(strength: float, coarse: float, threshold: float) -> None:
    if not abs(strength) < float("inf"):
        raise ValueError(f"The strength of an attribute must be a finite number, not {strength}.")
    for name, value in (("coarse amount", coarse), ("threshold", threshold)):
        if not 0 <= value <= 1:
            raise ValueError(f"The {name} of an attribute lies between 0 and 1, not {value:g}.")


def steering_wrapper(base_model, directions: tuple[Direction, ...]) -> Callable:
    """The DIFFUSION_MODEL wrapper. A function, not an object: core deep-copies model options on every clone."""

    def wrapper(
        executor, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None,
        transformer_options={}, **kwargs,  # noqa: B006  (core's own signature; never written to)
    ):  # fmt: skip
        forward = Forward(x, timestep, context, y, guidance, ref_latents, control, transformer_options, kwargs)
        network, kinds = executor.class_obj, transformer_options.get("cond_or_uncond") or [0]
        now = [each for each in directions if within(base_model, transformer_options, each.start, each.end)]
        grid = patch_grid(*x.shape[-2:], network.patch_size)
        acting = [(each, where) for each in now if (where := _where(each, forward, grid)) is not None]
        positives = [place for place, kind in enumerate(kinds) if kind == 0]
        if not acting or not positives:
            return forward.run(executor)
        _check_company(network, transformer_options)
        moving = [(each, where) for each, where in acting if each.strength != 0]
        pushes = [Push(each.strength, each.bounded, each.threshold, each.blocks, where.to(x.device)) for each, where in moving]
        prompts = [direction.edit for direction, _ in moving] + [direction.empty for direction, _ in moving[:1]]
        # Every stream is told the pooled vector that the painted row is told, as in the published code.
        latents = [x[place * forward.pictures :][: forward.pictures] for place in positives]
        rows = [Row(prompt._replace(pooled=None), latent, place) for place, latent in zip(positives, latents) for prompt in prompts]
        made = accompanied(forward, rows, obeyed(forward)) if rows else forward
        if rows and control:  # of the single blocks, which the companions do not reach
            made = made._replace(control={**made.control, "output": control.get("output", [])})
        pads = [made.context.shape[1] - prompt.context.shape[1] for prompt in prompts]
        steering = Steering(
            len(x), forward.pictures, positives, pushes, pads, grid[0] * grid[1], transformer_options.get(RECORD_KEY)
        )
        shift = _shift_of_text(network, made, acting, positives, forward)
        with hooked(network, steering if rows else None, shift, kinds):
            return evaluate(made, executor, base_model)

    return wrapper


def _where(direction: Direction, forward: Forward, grid: tuple[int, int]) -> Tensor | None:
    """[1 or B, patches]: how far the direction acts there. None where it does nothing at all."""
    if direction.strength == 0 and (direction.coarse == 0 or forward.y is None):
        return None
    if direction.region is None:
        return torch.ones(1, grid[0] * grid[1])
    where = resample(direction.region.float().cpu(), *grid).clamp(0, 1).flatten(1)
    if len(where) not in (1, forward.pictures):
        raise ValueError(f"An attribute has {len(where)} masks for {forward.pictures} pictures: give one, or one for each.")
    return where if where.any() else None


def _shift_of_text(network, made: Forward, acting: list, positives: list[int], forward: Forward) -> Tensor | None:
    """[rows, hidden]: what the coarse edits add to the vector that modulates the text; 0 for rows that they leave alone."""
    edits = [(each.edit.pooled, each.coarse) for each, _ in acting if each.coarse != 0 and each.edit.pooled is not None]
    if not edits or made.y is None:
        return None
    count, width = forward.pictures, network.params.vec_in_dim
    own = made.y[:, :width]
    moved = own.clone()
    for pooled, amount in edits:
        moved = coarse(moved, pooled.to(moved)[:, :width].repeat(len(moved) // len(pooled), 1), amount)
    steered = torch.zeros(len(own), 1, dtype=torch.bool, device=own.device)
    for place in positives:
        steered[place * count : (place + 1) * count] = True
    steered[len(forward.x) :] = True
    return torch.where(steered, network.vector_in(moved) - network.vector_in(own), 0)


def _check_company(network, transformer_options: dict) -> None:
    wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {})
    if source_gate.GATE_KEY in wrappers or reference_gate.GATE_KEY in wrappers:
        raise ValueError("Attribute Edit and a gate do not work on one model together: remove one of the two.")
    if compiled(network, transformer_options):
        raise ValueError("Attribute Edit does not reach into a compiled model: remove the node that compiles it.")
