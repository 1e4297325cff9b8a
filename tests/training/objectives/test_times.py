"""The draw of times: inside (0, 1), shifted as Flux shifts them."""
from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training.engine import Step  # noqa: E402
from semantic_diffusion_adapter.training.frozen.flux import shifted  # noqa: E402
from semantic_diffusion_adapter.training.objectives.times import sample_times  # noqa: E402


def test_times_are_shifted_and_inside():
    t = torch.linspace(0.01, 1, 50)
    assert torch.allclose(shifted(t, 0.0), t) and (shifted(t, 0.5)[:-1] > t[:-1]).all() and shifted(t, 0.5)[-1] == 1
    step = Step(0, 1, 0, "flux", torch.device("cpu"), range(4000), 4000)
    times = sample_times(step, 0.5, 0.0)
    assert ((times > 0) & (times < 1)).all()
    # The median of the shifted logit-normal is the shift of 1/2: e^mu / (e^mu + 1).
    assert abs(float(times.median()) - 0.6225) < 0.02
    flat = sample_times(step, 0.5, 1.0)
    assert abs(float(flat.mean()) - 0.5) < 0.02 and abs(float((flat < 0.25).float().mean()) - 0.25) < 0.03
