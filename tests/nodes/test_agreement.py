"""Training and the nodes compute one model: comfy's Flux under the patch against diffusers' Flux under training's attention."""

from __future__ import annotations

import dataclasses
import re

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
from semantic_diffusion_adapter.training.objectives.reconstruct import named_hierarchy  # noqa: E402


def diffusers_velocity(state: dict, config: dict, e, noise: torch.Tensor, masked: bool) -> torch.Tensor:
    network = training_flux.build_flux(config).eval()
    network.load_state_dict({k: v.float() for k, v in training_flux.from_bfl(state, config["hidden_size"]).items()})
    attention = attend_by_region(network)
    if masked:
        grid = (noise.shape[-2] // 2, noise.shape[-1] // 2)
        attention.regions = Regions(region_bias(e.boxes, e.strengths, grid, e.token_count))
    with torch.no_grad():
        return training_flux.velocity(network, noise, torch.ones(len(noise)), e.tokens, e.pooled)


def checkpoint_of(path) -> tuple[dict, dict]:
    from semantic_diffusion_adapter.kernels import checkpoint

    return checkpoint.load(path, "flux")


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_comfy_and_diffusers_give_one_velocity(assets, toy, embedding, size, masked):
    path = assets / miniature.FLUX
    state, record = checkpoint_of(path)
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


def test_the_gates_lora_is_one_in_both(assets, toy, embedding):
    """Load Miniature's gated model under Reference Gate and Masked Attention, with ReferenceLatent, against training's Flux."""
    from semantic_diffusion_adapter.nodes.host import reference_gate
    from semantic_diffusion_adapter.training.objectives.gate import LAYERS, GateObjective, GateTraining, merge_lora

    path = assets / miniature.FLUX
    state, record = checkpoint_of(path)
    e = dataclasses.replace(embedding("tree64"), pooled=torch.zeros(1, record["config"]["vec_in_dim"]))
    plain = miniature.load_flux(str(path))
    model = miniature.with_gate_lora(plain)
    noise = comfy.sample.prepare_noise(torch.zeros(1, 8, 16, 16), 0)
    reference = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:80, 16:64] = 1  # where nothing is read
    gated = reference_gate.patch(flux.patch(model), mask, 1.0, 0.0, 1.0, text_gate=0.0)
    latent = model.get_model_object("latent_format").process_out(reference)
    conditioning = [[context, {**more, "reference_latents": [latent]}] for context, more in to_conditioning(e)]
    result = model.get_model_object("latent_format").process_in(toy.sample(gated, conditioning, size=(16, 16), steps=1))

    network = training_flux.build_flux(record["config"]).eval()
    network.load_state_dict({k: v.float() for k, v in training_flux.from_bfl(state, record["config"]["hidden_size"]).items()})
    merge_lora(network, assets / miniature.GATE)
    layers = [name for name, _ in network.named_modules() if re.fullmatch(LAYERS, name)]
    assert sum(map(len, model.patches.values())) == len(layers) > 0, "core takes all of the file"
    objective = GateObjective(network, GateTraining())
    gates = 1 - torch.nn.functional.max_pool2d(mask[:, None], 16)[:, 0]
    with torch.no_grad():
        found = objective.velocity(noise, torch.ones(1), e.tokens, e.pooled, named_hierarchy("tree64"), reference, gates, 1.0)
    assert torch.allclose(result, noise - found, rtol=1e-3, atol=2e-3)
    bare = model.get_model_object("latent_format").process_in(toy.sample(flux.patch(model), to_conditioning(e), size=(16, 16), steps=1))
    assert not torch.allclose(result, bare, rtol=1e-3, atol=2e-3), "the reference must matter"


@pytest.mark.parametrize("bounded, threshold", [(True, 0.0), (False, 0.5)])
def test_an_attribute_edit_is_one_in_both(assets, toy, embedding, bounded, threshold):
    """The evaluation's steering on diffusers' modules against the node's on core's, boxes and region included."""
    from types import SimpleNamespace

    from semantic_diffusion_adapter.kernels.steering import Push
    from semantic_diffusion_adapter.nodes.host import directions
    from semantic_diffusion_adapter.training.miniature.evaluation.attention import Attention
    from semantic_diffusion_adapter.training.miniature.evaluation.steered import Steered
    from semantic_diffusion_adapter.training.miniature.evaluation.system import Miniature

    path = assets / miniature.FLUX
    state, record = checkpoint_of(path)
    config = record["config"]
    e = dataclasses.replace(embedding("tree64"), pooled=torch.zeros(1, config["vec_in_dim"]))
    words = [torch.randn(1, 7, config["context_in_dim"], generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    region = torch.zeros(1, 128, 128)
    region[:, :64, 32:] = 1
    model = flux.patch(miniature.load_flux(str(path)))
    edit, empty = ([[each, {"pooled_output": torch.randn(1, config["vec_in_dim"])}]] for each in words)
    steered = directions.patch(model, edit, empty, 0.8, bounded, threshold=threshold, region=region)
    result = model.get_model_object("latent_format").process_in(toy.sample(steered, to_conditioning(e), size=(16, 16), steps=1))
    noise = comfy.sample.prepare_noise(torch.zeros(1, 8, 16, 16), 0)

    network = training_flux.build_flux(config).eval()
    network.load_state_dict({k: v.float() for k, v in training_flux.from_bfl(state, config["hidden_size"]).items()})
    system = SimpleNamespace(flux=network, attention=Attention(), latent_shape=(8, 16, 16), device=torch.device("cpu"), precision="fp32")
    network.set_attn_processor(system.attention)
    system.velocity = lambda *arguments: Miniature.velocity(system, *arguments)
    with Steered(SimpleNamespace(system=system, own=e)) as by_hand:
        where = torch.nn.functional.avg_pool2d(region, 16).flatten(1)
        expected = noise - by_hand.velocity(noise, 1.0, e.tokens, tuple(words), Push(0.8, bounded, threshold, None, where))
    assert torch.allclose(result, expected, rtol=1e-3, atol=1e-3)
    plain = noise - diffusers_velocity(state, config, e, noise, True)
    assert (result - plain).abs().max() > 0.01, "it must steer"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
