from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels.attention import Regions, masked_attention  # noqa: E402
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS  # noqa: E402
from semantic_diffusion_adapter.kernels.visibility import region_bias  # noqa: E402
from semantic_diffusion_adapter.training.frozen import region_attention  # noqa: E402
from semantic_diffusion_adapter.training.frozen.flux import build_flux, velocity  # noqa: E402
from semantic_diffusion_adapter.training.frozen.region_attention import attend_by_region, short_attention  # noqa: E402


def regions_of(preset: str, grid=(4, 4), batch: int | None = None) -> Regions:
    boxes = PRESETS[preset].boxes()
    strengths = torch.zeros(len(boxes))
    strengths[3] = 0.7
    strengths[5] = float("-inf")
    if batch:
        strengths = torch.stack([strengths, *[torch.zeros(len(boxes))] * (batch - 1)])
    return Regions(region_bias(boxes, strengths, grid, len(boxes) + 2))


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_short_attention_is_the_kernel_forward_and_backward(batch, dtype, tolerance):
    regions = regions_of("tree64", batch=batch)
    torch.manual_seed(0)
    leaves = [torch.randn(2, 3, regions.length, 16, dtype=dtype) for _ in range(3)]
    upstream = torch.randn_like(leaves[0])

    def run(attention):
        q, k, v = (leaf.clone().requires_grad_() for leaf in leaves)
        out = attention(q, k, v)
        out.backward(upstream)
        return [out, q.grad, k.grad, v.grad]

    found = run(lambda q, k, v: short_attention(q, k, v, regions.floored()))
    oracle = run(lambda q, k, v: masked_attention(q.double(), k.double(), v.double(), regions, "dense").to(dtype))
    for a, b in zip(found, oracle):
        assert (a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max()


def test_a_token_gets_exactly_no_gradient_from_patches_outside_its_box():
    torch.manual_seed(0)
    boxes = PRESETS["tree64"].boxes()
    bias = region_bias(boxes, torch.zeros(64), (7, 9), 64)
    q, k, v = (torch.randn(2, 3, len(bias), 16, requires_grad=True) for _ in range(3))
    out = short_attention(q, k, v, Regions(bias).floored())
    for token in (17, 40, 63):
        outside = torch.isinf(bias[:, token])
        keys, values = torch.autograd.grad(out, (k, v), torch.randn_like(out) * outside[:, None], retain_graph=True)
        assert (keys[:, :, token] == 0).all() and (values[:, :, token] == 0).all() and keys[:, :, 0].any()


def test_without_regions_short_attention_is_plain():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 30, 8) for _ in range(3))
    torch.testing.assert_close(short_attention(q, k, v, None), torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_long_and_short_sequences_give_one_velocity(monkeypatch):
    """Above SHORT tokens the processor calls the kernel that the nodes call; the result must not depend on the length."""
    torch.manual_seed(0)
    flux = build_flux(dict(hidden_size=24, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[4, 4, 4], context_in_dim=10,
                           vec_in_dim=6, in_channels=4, guidance_embed=False, patch_size=2)).eval()
    attention = attend_by_region(flux)
    boxes = PRESETS["tree64"].boxes()
    attention.regions = Regions(region_bias(boxes, torch.zeros(64), (4, 4), 64))
    x, t, pooled = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.8]), torch.zeros(2, 6)
    results = []
    for short in (512, 0):
        monkeypatch.setattr(region_attention, "SHORT", short)
        context = torch.randn(2, 64, 10, generator=torch.Generator().manual_seed(3)).requires_grad_()
        out = velocity(flux, x, t, context, pooled)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out.detach(), context.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    attention.regions = None
    assert (velocity(flux, x, t, context, pooled) - results[0][0]).abs().max() > 1e-3, "the visibility must matter"
