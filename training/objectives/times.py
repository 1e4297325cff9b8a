"""The draw of a sample's time in the flow."""
from __future__ import annotations

import torch
from torch import Tensor

from ..engine.stage import Step
from ..frozen.flux import shifted


def sample_times(step: Step, mu: float, uniform: float) -> Tensor:
    """One time in (0, 1) for each sample of the step: the sigmoid of a normal number with the shift applied or, for a
    share `uniform`, a uniform number."""
    normal, flat, pick = torch.sigmoid(step.randn()), step.rand(), step.rand() < uniform
    return torch.where(pick, flat, shifted(normal, mu)).clamp(1e-3, 1 - 1e-3)
