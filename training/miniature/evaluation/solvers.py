"""Editing by inversion as ways of decoding: up from the source's latent under its embedding, down under the edited one.

The update rules and their papers stand in `kernels/inversion.py`; what the papers leave free was chosen on validation
edits, their defaults first.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

from ....kernels import inversion
from ....kernels.embedding import SemanticEmbedding
from .decoder import Decoder, Way

BEGIN = 0.9  # of fireflow, rf_solver and uniedit
OMEGA = 0.5  # the paper's 5 for prompts destroys what an embedding says
GAMMA, ETA, STOP = 0.5, 0.9, 0.5

Walk = Callable[[Tensor, list[float], inversion.Velocity], Iterator[Tensor]]


def uniedit(decoder: Decoder, edited: SemanticEmbedding, change: Tensor, begin: float = BEGIN,
            omega: float = OMEGA) -> np.ndarray:
    def joined(of_edited: inversion.Velocity, of_source: inversion.Velocity) -> inversion.Velocity:
        return lambda x, time: inversion.joined(of_edited(x, time), of_source(x, time), omega)

    return _walked(decoder, edited, begin, lambda rows: (inversion.corrected, inversion.plain), joined)


def fireflow(decoder: Decoder, edited: SemanticEmbedding, change: Tensor, begin: float = BEGIN) -> np.ndarray:
    return _walked(decoder, edited, begin, lambda rows: (inversion.reused, inversion.reused))


def rf_solver(decoder: Decoder, edited: SemanticEmbedding, change: Tensor, begin: float = BEGIN) -> np.ndarray:
    return _walked(decoder, edited, begin, lambda rows: (inversion.midpoint, inversion.midpoint))


def rf_inversion(decoder: Decoder, edited: SemanticEmbedding, change: Tensor, eta: float = ETA,
                 stop: float = STOP) -> np.ndarray:
    def walks(rows: slice) -> tuple[Walk, Walk]:
        source, noise = decoder.on_device(rows, decoder.latents, decoder.noise)
        return (lambda x, times, v: inversion.pulled(x, times, v, noise, GAMMA),
                lambda x, times, v: inversion.held(x, times, v, source, eta, stop))

    return _walked(decoder, edited, 1.0, walks)


def _walked(decoder: Decoder, edited: SemanticEmbedding, begin: float, walks: Callable[[slice], tuple[Walk, Walk]],
            joined: Callable[[inversion.Velocity, inversion.Velocity], inversion.Velocity] | None = None) -> np.ndarray:
    """Up from the source to the time `begin`, and down by the edited velocity or by what `joined` makes of the two."""
    times = [*(now for now, _ in decoder.steps(begin)), 0.0]

    def work(rows: slice) -> Tensor:
        source, before, after = decoder.on_device(rows, decoder.latents, decoder.own.tokens, edited.tokens)
        of_edited, of_source = (lambda x, time, e=e: decoder.velocity(x, time, e) for e in (after, before))
        up, down = walks(rows)
        x = _last(up(source, times[::-1], of_source))
        return _last(down(x, times, joined(of_edited, of_source) if joined else of_edited))

    return decoder.paint(work)


def _last(walk: Iterator[Tensor]) -> Tensor:
    return deque(walk, maxlen=1).pop()


SOLVERS = (
    Way("rf_inversion", lambda d: 2 * len(d.steps()), rf_inversion),
    Way("rf_solver", lambda d: 4 * len(d.steps(BEGIN)), rf_solver),
    Way("fireflow", lambda d: 2 * len(d.steps(BEGIN)) + 2, fireflow),
    Way("uniedit", lambda d: 3 * len(d.steps(BEGIN)) + 1, uniedit),
)
