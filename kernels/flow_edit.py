"""FlowEdit (Kulikov et al., arXiv 2412.08629): from a picture to its edit along the difference of two velocities.

With x_s = (1 - s) x_0 + s n the source's latent x_0 under noise n at time s, and z the edited latent, which begins at
x_0, the paper's step is dz/ds = mean over n of v_edited(z + x_s - x_0) - v_source(x_s). Nothing is inverted. A sampler that
is told the denoised latent D = z - s dz/ds takes that step, and with D = x - s v on either side s cancels:
D = x_0 + mean over n of (D_edited(z + x_s - x_0) - D_source(x_s)).
"""

from __future__ import annotations

from torch import Tensor


def coupled(z: Tensor, source: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """(where the edited side is evaluated, where the source's is), both like z.

    z: the edited latent; source: x_0; noise: n; time: s in 0..1, broadcast against them. Where z is the source the two
    are the same, bit for bit.
    """
    noised = time * (noise - source)
    return z + noised, source + noised


def interval(time: float, times: Tensor) -> int:
    """How many of a falling schedule `times` [N] lie above a time: the number of the step that begins there.

    A noise for each number is thus one for each place of the schedule, however often a sampler evaluates there.
    """
    return int((times.double() > time * (1 + 1e-4)).sum())
