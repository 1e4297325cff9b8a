"""Training and the nodes compute one model: comfy's Flux under the patch against diffusers' Flux under training's attention."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")
pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

import comfy.sample  # noqa: E402
from semantic_diffusion_adapter.kernels.attention import Regions  # noqa: E402
from semantic_diffusion_adapter.kernels.visibility import region_bias  # noqa: E402
from semantic_diffusion_adapter.nodes.host import flux, miniature  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402
from semantic_diffusion_adapter.training.frozen import flux as training_flux  # noqa: E402
from semantic_diffusion_adapter.training.frozen.region_attention import attend_by_region  # noqa: E402


def diffusers_velocity(state: dict, config: dict, e, noise: torch.Tensor, masked: bool) -> torch.Tensor:
    network = training_flux.build_flux(config).eval()
    network.load_state_dict({k: v.float() for k, v in training_flux.from_bfl(state, config["hidden_size"]).items()})
    attention = attend_by_region(network)
    if masked:
        grid = (noise.shape[-2] // 2, noise.shape[-1] // 2)
        attention.regions = Regions(region_bias(e.boxes, e.strengths, grid, e.token_count))
    with torch.no_grad():
        return training_flux.velocity(network, noise, torch.ones(len(noise)), e.tokens, e.pooled)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_comfy_and_diffusers_give_one_velocity(assets, toy, embedding, size, masked):
    from semantic_diffusion_adapter.kernels import checkpoint

    path = assets / miniature.FLUX
    state, record = checkpoint.load(path, "flux")
    model = miniature.load_flux(str(path))
    e = embedding("tree64")
    # One Euler step from time 1 to 0 is noise - velocity.
    result = toy.sample(flux.patch(model) if masked else model, to_conditioning(e), size=size, steps=1)
    noise = comfy.sample.prepare_noise(torch.zeros(1, 8, *size), 0)
    expected = noise - diffusers_velocity(state, record["config"], e, noise, masked)
    result = model.get_model_object("latent_format").process_in(result)
    assert torch.allclose(result, expected, rtol=1e-3, atol=1e-3)
    other = noise - diffusers_velocity(state, record["config"], e, noise, not masked)
    assert not torch.allclose(result, other, rtol=1e-3, atol=1e-3), "the visibility must matter"
