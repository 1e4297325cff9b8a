"""The source gate: patches of the painted picture read the source's keys and values, in the very forward that paints.

Or they are compared by its queries and keys, which gives them its layout and leaves them their own values (the attention
maps of Prompt-to-Prompt, arXiv 2208.01626, on joint attention as in ConsistEdit, arXiv 2510.17803).

A companion's row holds the source, noised to the same sigma with the sampler's own noise (exact on a straight path, so no
inversion is needed), under the source's conditioning. The attention override lets each query read its image keys instead
of the picture's own, by its gate (`kernels/attention/source.py`). Gate 0 everywhere is core's picture bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.attention import Source
from ...kernels.blocks import Blocks
from ...kernels.gate import sequence_gate
from ...kernels.noise import own_noise
from .companions import Companion, Forward, Row, accompanied, companion_of, evaluate, obeyed
from .flux import check_model, within
from .gates import Opening, gates_of, opening_of, put_around, reading, watching_wrapper
from .override import OVERRIDE_KEY
from .source import check_flow, source_of
from .watch import Watch

GATE_KEY = "sda_source_gate"
NOISE_KEY = "sda_noise"
WHAT = "Source Gate"


class Settings(NamedTuple):
    """What the patch was asked for. latent: the source's LATENT in the VAE's scale. share: one of SHARES."""

    companion: Companion
    latent: Tensor
    opening: Opening
    share: str


class Reader:
    """What every attention of one forward needs to read the source.

    rows: of what is painted; the companions' come after them, one for each picture. gates [B, rows, cols].
    """

    watch: Watch | None = None  # of the forward, by `reading`

    def __init__(self, rows: int, gates: Tensor, text_gate: float, blocks: Blocks | None, previous: Callable | None) -> None:
        self.blocks, self.previous = blocks, previous
        self._rows, self._gates, self._text_gate = rows, gates, text_gate
        self._made: Source | None = None

    def read(self, q: Tensor, k: Tensor, v: Tensor, text: int) -> tuple[Tensor, Tensor, Tensor, Source]:
        """(queries, keys, values, the source) for queries [R + B, H, S, d] of the joint sequence: text, patches, references."""
        count, patches = len(self._gates), self._gates[0].numel()
        of_picture = torch.arange(len(k), device=k.device) % count + self._rows
        keys, values = (each[:, :, text : text + patches][of_picture] for each in (k, v))
        if self._made is not None and self._made.gate.shape[1] == q.shape[2]:
            return q, k, v, self._made.over(keys, values)
        gates = sequence_gate(self._gates, text, self._text_gate, q.shape[2] - text - patches)
        gates = gates.repeat(self._rows // count, 1)
        gates = torch.cat([gates, torch.zeros_like(gates[:count])])  # the companions read none
        self._made = Source(keys, values, gates.to(q.device), (text, text + patches))
        return q, k, v, self._made


class Layout(Reader):
    """The same where queries and keys are shared: every patch is compared by the source's, as far as its gate is open."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, text: int) -> tuple[Tensor, Tensor, Tensor, None]:
        count, rows = len(self._gates), self._rows
        patches = slice(text, text + self._gates[0].numel())
        amount = self._gates.flatten(1).clamp(max=1).repeat(rows // count, 1)[:, None, :, None]

        def shared(own: Tensor) -> Tensor:
            own = own.clone()
            there = own[rows:, :, patches].repeat(rows // count, 1, 1, 1)
            own[:rows, :, patches] = torch.lerp(own[:rows, :, patches], there, amount.to(own))
            return own

        return shared(q), shared(k), v, None


_READERS = {"keys and values": Reader, "queries and keys": Layout}
SHARES = tuple(_READERS)


def patch(
    model, source: list, latent: dict, mask: Tensor | None = None, strength: float = 1.0, lo: float = 0.0, hi: float = 1.0,
    text_gate: float = 0.0, start: float = 0.0, end: float = 1.0, blocks: str = "all", share: str = SHARES[0],
):  # fmt: skip
    """A clone of a Flux MODEL whose patches read a source. Several gates stand beside one another only by masks: a second
    one replaces the first.

    source: what the source shows, a CONDITIONING of one entry; latent: its LATENT. mask: MASK, where the picture may
        change. The other settings are those of `kernels.gate` and of Masked Attention; with queries and keys shared, the
        gate is 1 at most and the text's is not there.
    """
    network = model.get_model_object("diffusion_model")
    check_model(model.model, network, WHAT)
    check_flow(model, WHAT)
    samples, _ = source_of(latent)
    opening = opening_of(network, mask, strength, lo, hi, text_gate, start, end, blocks)
    settings = Settings(companion_of(source, WHAT), samples, opening, share)
    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, GATE_KEY)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, GATE_KEY, noise_wrapper)
    put_around(patched, GATE_KEY, reading_wrapper(model.model, settings), watching_wrapper(WHAT, opening, reads))
    return patched


def reads(gates: Tensor, forward: Forward) -> bool:
    return bool(gates.any())


def noise_wrapper(executor, noise, latent_image, sampler, sigmas, *rest, **more):
    """Lets the forwards of one sampling know its noise: the source's path then begins where the picture's does."""
    guider = executor.class_obj
    guider.model_options["transformer_options"] = {**guider.model_options.get("transformer_options", {}), NOISE_KEY: noise}
    return executor(noise, latent_image, sampler, sigmas, *rest, **more)


def reading_wrapper(base_model, settings: Settings) -> Callable:
    """The DIFFUSION_MODEL wrapper. A function, not an object: core deep-copies model options on every clone."""

    def wrapper(
        executor, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None,
        transformer_options={}, **kwargs,  # noqa: B006  (core's own signature; never written to)
    ):  # fmt: skip
        forward = Forward(x, timestep, context, y, guidance, ref_latents, control, transformer_options, kwargs)
        gates = gates_of(settings.opening, forward, executor.class_obj.patch_size)
        opening = settings.opening
        if not within(base_model, transformer_options, opening.start, opening.end) or not reads(gates, forward):
            return forward.run(executor)
        made = accompanied(forward, [Row(settings.companion, noised(base_model, settings, forward))], obeyed(forward))
        options = made.transformer_options
        reader = _READERS[settings.share](len(x), gates.to(x.device), opening.text_gate, opening.blocks, options.get(OVERRIDE_KEY))
        return evaluate(reading(made, reader, executor.class_obj.patch_size), executor, base_model)[: len(x)]

    return wrapper


def noised(base_model, settings: Settings, forward: Forward) -> Tensor:
    """The source [B, C, H, W] at the sigma of the forward, in the model's own scale."""
    x, count = forward.x, forward.pictures
    source = base_model.process_latent_in(settings.latent).to(x)
    if source.shape[-2:] != x.shape[-2:] or len(source) not in (1, count):
        raise ValueError(
            f"The source's latent is {list(source.shape)} and what is painted {[count, *x.shape[1:]]}: use one size, and one "
            "source or one for each picture."
        )
    noise = forward.transformer_options.get(NOISE_KEY)
    if noise is None or noise.shape[-2:] != x.shape[-2:] or len(noise) != count:
        noise = own_noise(source.shape[1:], range(count), 0)
    sigma = forward.timestep[:count].to(x).reshape(-1, 1, 1, 1)
    return (1 - sigma) * source + sigma * noise.to(x)
