"""One set of scenes to be painted in every way of `fidelity`: their latents, noise, change maps and masks."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ....kernels.change_map import changed, enlarge, patch_change, relative, times
from ....kernels.embedding import SemanticEmbedding
from ....kernels.noise import own_noise
from ..base import schedule
from ..scenes import SIZE
from .system import STEPS, Miniature

NOISES, THRESHOLD, GROW, FEATHER = 4, 0.03, 1, 0.05  # the defaults of Change Mask and of Keep Outside Mask
CELLS = 2  # latent cells to a side of a patch
MAPPED = 2 * NOISES  # evaluations that a change map costs
PATCH = 16  # pixels to a side of a patch


class Decoder:
    """Scenes and what paints them. sources: pictures [N, 128, 128, 3] uint8; own: their embeddings; noise: [N, C, h, w];
    seed: of all other noise; start: the time at which SDEdit begins. `latents` are the sources' [N, C, h, w]."""

    def __init__(self, system: Miniature, sources: np.ndarray, own: SemanticEmbedding, noise: Tensor, seed: int,
                 start: float = 1.0) -> None:
        self.system, self.sources, self.own, self.noise = system, sources, own, noise
        self.latents, self.seed, self.start = system.latents(sources), seed, start

    def change(self, edited: SemanticEmbedding) -> Tensor:
        """[N, 8, 8] in 0..1: the change map of the edited embeddings."""
        found = torch.zeros(())
        for number, time in enumerate(times(NOISES)):
            x = (1 - time) * self.latents + time * self.drawn(slice(None), number)
            one, other = (self.system.velocities(e, x, time) for e in (edited, self.own))
            found = found + patch_change(one, other)
        return relative(found)

    def mask(self, change: Tensor, grow: int = GROW) -> Tensor:
        """[N, 128, 128] of 0 and 1: the pixels that Change Mask finds."""
        return enlarge(changed(change, THRESHOLD, grow), SIZE, SIZE, PATCH)

    def cells(self, change: Tensor) -> Tensor:
        """[N, 1, h, w] bool: the same in cells of the latent."""
        mask = changed(change, THRESHOLD, GROW)
        return mask.repeat_interleave(CELLS, 1).repeat_interleave(CELLS, 2)[:, None] > 0

    def steps(self, start: float = 1.0) -> list[tuple[float, float]]:
        """(time, next time) of every step from a start on."""
        when = schedule(STEPS, self.system.mu, start).tolist()
        return list(zip(when[:-1], when[1:]))

    def paint(self, work: Callable[[slice], Tensor]) -> np.ndarray:
        """Pictures [N, 128, 128, 3] uint8 of the latents that work(rows) makes of every batch, by `velocity`."""
        return self.system.paint_by(self.own, len(self.latents), work)

    def velocity(self, x: Tensor, time: float, tokens: Tensor) -> Tensor:
        """What Flux predicts under tokens of the sources' layout; within `paint` alone."""
        return self.system.velocity(x, time, tokens)

    def drawn(self, rows: slice, *key: int) -> Tensor:
        """Noise of these scenes, a pure function of the seed, the key and each one's number."""
        return own_noise(self.latents.shape[1:], range(len(self.latents))[rows], self.seed, *key)

    def on_device(self, rows: slice, *tensors: Tensor | None) -> list[Tensor | None]:
        return [None if each is None else each[rows].to(self.system.device) for each in tensors]


class Way(NamedTuple):
    """A way of decoding. evaluations(decoder): those of Flux for one picture, with the change map's where it is read.
    paint(decoder, edited, change): pictures [N, 128, 128, 3] uint8 of the edited embeddings, whose change map is given."""

    name: str
    evaluations: Callable[[Decoder], int]
    paint: Callable[[Decoder, SemanticEmbedding, Tensor], np.ndarray]
