"""A network takes weights that fit it exactly, and says what does not fit before it takes memory."""

from __future__ import annotations

import pytest
import torch
from semantic_diffusion_adapter.kernels import weights


def test_a_module_is_compared_before_it_takes_memory():
    """A record may ask for a network of terabytes: its tensors say that there is none."""
    made = []

    def make() -> torch.nn.Module:
        module = torch.nn.Linear(2**20, 2**20, bias=False)
        made.append(module.weight.device.type)
        return module

    with pytest.raises(ValueError, match="'weight' has shape .* where its record implies"):
        weights.build(make, {"weight": torch.ones(2, 2)}, "file")
    assert made == ["meta"]
    module = weights.build(lambda: torch.nn.Linear(2, 2, bias=False), {"weight": torch.ones(2, 2).half()}, "file")
    assert torch.equal(module.weight, torch.ones(2, 2))


def test_fill_names_what_does_not_fit():
    module = torch.nn.Linear(3, 2)
    state = {"weight": torch.ones(2, 3, dtype=torch.float16), "bias": torch.zeros(2)}
    weights.fill(module, state, "file.safetensors")
    assert module.weight.dtype == torch.float32 and torch.equal(module.weight, torch.ones(2, 3))
    with pytest.raises(ValueError, match="file.safetensors lacks 'bias'"):
        weights.fill(module, {"weight": state["weight"]}, "file.safetensors")
    with pytest.raises(ValueError, match="unknown tensor 'extra'"):
        weights.fill(module, state | {"extra": torch.ones(1)}, "file.safetensors")
    with pytest.raises(ValueError, match="'bias' is torch.int64 in file.safetensors where its record implies torch.float32"):
        weights.fill(module, state | {"bias": torch.zeros(2, dtype=torch.int64)}, "file.safetensors")
    with pytest.raises(ValueError, match=r"'weight' has shape \(3, 2\)"):
        weights.fill(module, state | {"weight": torch.ones(3, 2)}, "file.safetensors")
