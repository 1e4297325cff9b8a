"""What saves memory or time leaves the gradient as it was: checkpointing and compiled blocks against the plain path."""
from __future__ import annotations

import os
import shutil

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels.adapter import Adapter, AdapterConfig  # noqa: E402
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS  # noqa: E402
from semantic_diffusion_adapter.kernels.vision.towers import TowerConfig, build_tower  # noqa: E402
from semantic_diffusion_adapter.training.engine import Step, compile_blocks  # noqa: E402
from semantic_diffusion_adapter.training.frozen.flux import build_flux  # noqa: E402
from semantic_diffusion_adapter.training.frozen.region_attention import attend_by_region  # noqa: E402
from semantic_diffusion_adapter.training.objectives.reconstruct import AdapterObjective, AdapterTraining, Batch  # noqa: E402

TOWER = TowerConfig("dino", "dinov2", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56,
                                       "patch_size": 14, "mlp_ratio": 2}, 56, 14, 16, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def toy() -> AdapterObjective:
    torch.manual_seed(0)
    flux = build_flux(dict(hidden_size=24, num_heads=2, depth=1, depth_single_blocks=2, axes_dim=[4, 4, 4], context_in_dim=20,
                           vec_in_dim=6, in_channels=4, guidance_embed=False, patch_size=2)).eval().requires_grad_(False)
    for parameter in flux.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    attention = attend_by_region(flux)
    adapter = Adapter(AdapterConfig(PRESETS["tree128"].to_json(), (TOWER,), width=32, heads=2, layers=1, out_dim=20))
    return AdapterObjective(flux, attention, adapter, {"dino": build_tower(TOWER).requires_grad_(False)},
                            AdapterTraining(growth=((1.0, "tree64"),)))


def gradient(toy: AdapterObjective, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, int]:
    """(the whole gradient of a step as one vector, bytes that the forward kept for the backward)."""
    step, kept = Step(0, 1, 0, "adapter", torch.device("cpu"), range(2), 2), 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss, _ = toy.loss(Batch(step.randn(4, 8, 8), step.rand(3, 64, 64)), step)
    parameters = [p for p in toy.adapter.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters)
    return torch.cat([g.flatten() for g in found]), kept


def compare(name: str, plain: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    cosine = float(torch.nn.functional.cosine_similarity(plain.double(), found.double(), dim=0))
    error = float((plain - found).abs().max() / plain.abs().max())
    print(f"{name}: cosine {cosine:.12f}, largest error {error:.1e} of the largest gradient")
    return cosine, error


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_checkpointing_keeps_less_and_changes_no_bit_of_the_gradient(toy, dtype):
    plain, much = gradient(toy, dtype)
    toy.flux.enable_gradient_checkpointing()
    found, little = gradient(toy, dtype)
    compare(f"checkpointing, {dtype or torch.float32}: {much} -> {little} bytes kept", plain, found)
    assert torch.equal(plain, found) and little < much / 2


@pytest.mark.skipif(not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))), reason="no C++ compiler here")
def test_a_compiled_block_gives_the_same_gradient(toy):
    """One block, whose attention reads the visibility from beside its arguments, and checkpointed: what is computed again in the
    backward is compiled as it is without. Each compilation costs some seconds."""
    plain, _ = gradient(toy)
    compile_blocks(toy.flux.single_transformer_blocks[:1])
    toy.flux.enable_gradient_checkpointing()
    calls = torch._dynamo.utils.counters["stats"]["calls_captured"]
    cosine, error = compare("compiled and checkpointed", plain, gradient(toy)[0])
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > calls, "something was compiled"
    assert cosine > 1 - 1e-9 and error < 1e-4
