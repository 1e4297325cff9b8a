"""Are the gradients through this model right? Asked once before a fit, of the model as it is, with other packs' patches.

The derivative of the fit's own loss along its gradient is compared with a central difference. A block that changes its
input in place behind gradient checkpointing, or a kernel without a backward, gives plausible and wrong gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...kernels.fit import Fit, Velocity
from .watch import packs

# By whether the model computes in float32: the steps, in shares of the loss that they change by the gradient; and by
# what share the two derivatives may differ.
_FINE = ((1e-3, 1e-2), 0.05)
_COARSE = ((3e-2, 1e-2), 0.2)
_FARTHEST = 0.1  # deviations of the text space, root mean square


def check_gradients(
    fit: Fit, latents: Tensor, velocity: Velocity, dtype: torch.dtype, network: nn.Module, transformer_options: dict
) -> None:
    """ValueError where the gradients of a fit that has not begun are wrong.

    Costs one forward and backward, and up to five forwards (nine with the pooled vector).
    """
    wrong = difference(fit, latents, velocity, dtype)
    if wrong is not None:
        names = packs(network, transformer_options)
        who = f"a node of {names}" if names else "another node that patches this model (a cache, a block patch)"
        raise ValueError(
            f"The gradients through this model are wrong ({wrong}), most likely because of {who}: connect the model "
            "from before that node to the fit."
        )


def difference(fit: Fit, latents: Tensor, velocity: Velocity, dtype: torch.dtype) -> str | None:
    """None where the gradients are right, else what is wrong with them."""
    shares, tolerance = _FINE if torch.finfo(dtype).bits >= 32 else _COARSE
    values = [fit.space.normalise(fit.start.tokens.float())]
    if fit.settings.pooled:
        values.append(fit.start.pooled.float())
    try:
        loss, gradients = fit.gradients(latents, velocity)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # autograd's own refusals
        return str(error).splitlines()[0]
    with torch.no_grad():
        plain = fit.loss(latents, velocity, values).item()
    if not abs(loss - plain) <= tolerance * abs(plain):
        return f"with gradients the loss is {loss:.4g} and without {plain:.4g}"
    for place, gradient in enumerate(gradients):
        gradient = gradient.float() / len(latents)
        slope = gradient.norm().item()
        if not math.isfinite(slope) or slope == 0:
            return f"their size is {slope}"
        found = []
        for share in shares:
            far = min(share * loss / slope, _FARTHEST * math.sqrt(gradient.numel()))
            move = far * gradient / slope
            ends = []
            for sign in (1, -1):
                moved = [value + sign * move if i == place else value for i, value in enumerate(values)]
                with torch.no_grad():
                    ends.append(fit.loss(latents, velocity, moved).item())
            found.append((ends[0] - ends[1]) / (2 * far))
            if abs(found[-1] - slope) <= tolerance * slope:
                break
        else:
            return f"the loss changes by {found[0]:.4g} a unit where they say {slope:.4g}"
    return None
