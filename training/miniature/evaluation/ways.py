"""Our own ways of decoding an edit, and SDEdit: what each does stands in `fidelity`."""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ....kernels.algebra import restrict
from ....kernels.change_map import soften
from ....kernels.embedding import SemanticEmbedding, from_hierarchy
from ....kernels.flow_edit import coupled
from ....kernels.regions import feather
from .decoder import FEATHER, MAPPED, STEPS, Decoder, Way

BEGIN = 0.9  # the time at which a flow edit begins: from 1 on it moves more of what the edit does not touch
EDGE = 4  # half of the pixels within which a composite fades: 0.5 patches of feather


def anew(decoder: Decoder, edited: SemanticEmbedding, start: float = 1.0, inside: Tensor | None = None) -> np.ndarray:
    """From noise, or from the source's latent under that of the time `start`, the rest held at the source's."""
    def work(rows: slice) -> Tensor:
        source, noise, tokens, free = decoder.on_device(rows, decoder.latents, decoder.noise, edited.tokens, inside)
        x = (1 - start) * source + start * noise
        for now, later in decoder.steps(start):
            if free is not None:
                x = torch.where(free, x, (1 - now) * source + now * noise)
            x = x + (later - now) * decoder.velocity(x, now, tokens)
        return x if free is None else torch.where(free, x, source)

    return decoder.paint(work)


def flow_edit(decoder: Decoder, edited: SemanticEmbedding, inside: Tensor | None = None) -> np.ndarray:
    """From the source's latent at the time BEGIN, held outside of `inside`; new noise at every step."""
    def work(rows: slice) -> Tensor:
        source, before, after, free = decoder.on_device(rows, decoder.latents, decoder.own.tokens, edited.tokens, inside)
        z = source
        for step, (now, later) in enumerate(decoder.steps(BEGIN)):
            sides = coupled(z, source, decoder.drawn(rows, step, 0).to(z), torch.tensor(now))
            one, other = (decoder.velocity(x, now, tokens) for x, tokens in zip(sides, (after, before)))
            z = z + (later - now) * (one - other)
            z = z if free is None else torch.where(free, z, source)
        return z

    return decoder.paint(work)


def keep_outside(decoder: Decoder, edited: SemanticEmbedding, change: Tensor) -> np.ndarray:
    kept = []
    for number, mask in enumerate(decoder.mask(change)):
        one, own = (SemanticEmbedding(e.tokens[number:number + 1], e.boxes, e.levels, e.strengths)
                    for e in (edited, decoder.own))
        kept.append(restrict(one, own, feather(mask, FEATHER)).tokens)
    return anew(decoder, from_hierarchy(torch.cat(kept), decoder.own.hierarchy()))


def flow_edit_composited(decoder: Decoder, edited: SemanticEmbedding, change: Tensor) -> np.ndarray:
    """The flow edit where the change map is above the threshold, the source's own pixels elsewhere. Nothing is held while
    it is painted, and the mask is not grown: a soft edge over the free picture hides the seam."""
    soft = soften(decoder.mask(change, grow=0), EDGE)[..., None].numpy()
    apart = flow_edit(decoder, edited).astype(np.float32) - decoder.sources
    return np.rint(decoder.sources + soft * apart).astype(np.uint8)


def _flow_steps(decoder: Decoder) -> int:
    return 2 * len(decoder.steps(BEGIN))


OURS = (
    Way("plain", lambda d: STEPS, lambda d, edited, change: anew(d, edited)),
    Way("keep_outside", lambda d: STEPS + MAPPED, keep_outside),
    Way("change_mask", lambda d: STEPS + MAPPED, lambda d, edited, change: anew(d, edited, inside=d.cells(change))),
    Way("flow_edit", _flow_steps, lambda d, edited, change: flow_edit(d, edited)),
    Way("flow_edit_masked", lambda d: _flow_steps(d) + MAPPED,
        lambda d, edited, change: flow_edit(d, edited, d.cells(change))),
    Way("flow_edit_composited", lambda d: _flow_steps(d) + MAPPED, flow_edit_composited),
    Way("sdedit", lambda d: len(d.steps(d.start)), lambda d, edited, change: anew(d, edited, d.start)),
)
