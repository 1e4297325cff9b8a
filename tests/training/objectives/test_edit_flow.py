"""The area-weighted flow loss of edits."""
from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels.hierarchy import PRESETS  # noqa: E402
from semantic_diffusion_adapter.training.engine import Step  # noqa: E402
from semantic_diffusion_adapter.training.frozen.encoders import Latents  # noqa: E402
from semantic_diffusion_adapter.training.frozen.flux import build_flux  # noqa: E402
from semantic_diffusion_adapter.training.objectives.edit_flow import EditFlow, FlowTraining, area_weights  # noqa: E402

CPU = torch.device("cpu")
QUAD = PRESETS["quad64"]


def changed(*boxes: tuple[int, int, int, int], value: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """A grey 64 x 64 picture, and the same with other boxes (x0, y0, x1, y1) in pixels."""
    source = torch.full((1, 3, 64, 64), 0.4)
    target = source.clone()
    for x0, y0, x1, y1 in boxes:
        target[:, 0, y0:y1, x0:x1] += value
    return source, target


def weights(source, target, **settings):
    return area_weights(source, target, 8, 8, FlowTraining(**settings))[0, 0]


def test_what_changed_and_its_neighbours_weigh_more_the_smaller_the_change():
    one = weights(*changed((24, 24, 32, 32)))  # one latent of 64, nine with its neighbours
    inside, outside = one[2:5, 2:5], one[0, 0]
    torch.testing.assert_close(inside / outside, torch.full((3, 3), math.log2(64 / 9) + 1))
    assert (one == outside).sum() == 64 - 9 and one.mean().item() == pytest.approx(1)
    half = weights(*changed((0, 0, 64, 24)))  # three rows and their neighbours: half of the picture
    torch.testing.assert_close(half[0, 0] / half[7, 0], torch.tensor(math.log2(2) + 1))


@pytest.mark.parametrize("boxes", [(), ((0, 0, 64, 64),)])
def test_no_change_and_nothing_but_change_weigh_alike_everywhere(boxes):
    torch.testing.assert_close(weights(*changed(*boxes)), torch.ones(8, 8))


def test_noise_and_specks_are_no_change():
    source, target = changed((24, 24, 32, 32), value=0.05)
    assert weights(source, target).eq(1).all() and not weights(source, target, threshold=0.01).eq(1).all()
    speck = changed((24, 24, 27, 27))
    assert weights(*speck).eq(1).all() and not weights(*speck, share=0.1).eq(1).all()


def test_samples_are_weighed_each_on_its_own():
    small, large = changed((24, 24, 32, 32)), changed((0, 0, 64, 40))
    both = area_weights(torch.cat([small[0], large[0]]), torch.cat([small[1], large[1]]), 8, 8, FlowTraining())
    assert torch.equal(both[0, 0], weights(*small)) and torch.equal(both[1, 0], weights(*large))


@pytest.fixture(scope="module")
def flow() -> EditFlow:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    config = dict(hidden_size=48, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[8, 8, 8], context_in_dim=24, vec_in_dim=16,
                  in_channels=4, patch_size=2, guidance_embed=True)
    flux = build_flux(config).eval().requires_grad_(False)
    vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=[8, 8],
                        latent_channels=4, norm_num_groups=4).eval().requires_grad_(False)
    return EditFlow(flux, Latents(vae), FlowTraining(weight=1))


def step(batch: int = 2) -> Step:
    return Step(0, 1, 0, "editor", CPU, range(batch), batch)


def arguments():
    source, target = (torch.cat([p] * 2) for p in changed((0, 0, 16, 16)))
    return torch.randn(2, 64, 24, generator=torch.Generator().manual_seed(0)), None, QUAD, source, target


def test_the_loss_is_the_weighted_error_of_the_velocity(flow, monkeypatch):
    """With a velocity that is off by 1 in one latent, it is that latent's weight over all of them."""
    from semantic_diffusion_adapter.training.objectives import edit_flow

    tokens, pooled, hierarchy, source, target = arguments()
    seen = {}

    def off_by_one(flux, x, t, context, pooled, guidance):
        seen.update(x=x, t=t, pooled=pooled, guidance=guidance)
        truth = (x - seen["x0"]) / t[:, None, None, None]
        truth[:, 0, 2, 3] += 1
        return truth

    moments = flow.vae.moments

    def known(images):
        seen["x0"], deviation = moments(images)
        return seen["x0"], deviation * 0

    monkeypatch.setattr(edit_flow, "velocity", off_by_one)
    monkeypatch.setattr(flow.vae, "moments", known)
    loss = flow.loss(tokens, pooled, hierarchy, source, target, step()).item()
    rows, cols = seen["x0"].shape[-2:]
    weight = area_weights(source, target, rows, cols, flow.settings)[0, 0, 2, 3].item()
    assert weight > 1 and loss == pytest.approx(weight / (4 * rows * cols), rel=1e-3)
    assert seen["guidance"].eq(1.0).all() and seen["pooled"].eq(0).all() and ((0 < seen["t"]) & (seen["t"] < 1)).all()


def test_every_visible_token_learns_and_flux_does_not(flow):
    tokens, *rest = arguments()
    tokens.requires_grad_(True)
    flow.loss(tokens, *rest, step()).backward()
    assert tokens.grad.abs().sum((0, 2)).min() > 0
    assert all(p.grad is None for p in flow.flux.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_route_of_a_gpu_learns_the_same(flow, checkpointing, both_routes):
    def run():
        tokens, *rest = arguments()
        tokens.requires_grad_(True)
        flow.loss(tokens, *rest, step()).backward()
        return tokens.grad

    if checkpointing:
        flow.flux.enable_gradient_checkpointing()
    short, long = both_routes(run)
    flow.flux.disable_gradient_checkpointing()
    torch.testing.assert_close(long, short, rtol=1e-4, atol=1e-7)


def test_recomputing_flux_gives_the_gradients_of_keeping(flow):
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            flow.flux.enable_gradient_checkpointing()
        tokens, *rest = arguments()
        tokens.requires_grad_(True)
        flow.loss(tokens, *rest, step()).backward()
        gradients.append(tokens.grad)
    flow.flux.disable_gradient_checkpointing()
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)
