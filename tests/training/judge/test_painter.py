"""The painter on a base as FLUX.1 publishes it: a single file without our record, a diffusers VAE with a scale and a shift."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from diffusers import AutoencoderKL  # noqa: E402
from semantic_diffusion_adapter.kernels import checkpoint  # noqa: E402
from semantic_diffusion_adapter.kernels.adapter import Adapter, AdapterConfig  # noqa: E402
from semantic_diffusion_adapter.kernels.hierarchy import Hierarchy  # noqa: E402
from semantic_diffusion_adapter.training.frozen.base import base_sha256  # noqa: E402
from semantic_diffusion_adapter.training.frozen.encoders import load_towers  # noqa: E402
from semantic_diffusion_adapter.training.frozen.flux import build_flux, to_bfl  # noqa: E402
from semantic_diffusion_adapter.training.judge.encoders import to_tensor  # noqa: E402
from semantic_diffusion_adapter.training.judge.painter import Files, Painter, seed_of  # noqa: E402

CPU = torch.device("cpu")
FLUX = dict(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], context_in_dim=48, vec_in_dim=32,
            in_channels=4, patch_size=2, guidance_embed=True)


@pytest.fixture(scope="module")
def painter(tmp_path_factory, miniature_files) -> Painter:
    """Random weights but for the towers, which are the miniature's."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("flux")
    flux = build_flux(FLUX)
    for parameter in flux.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(to_bfl(flux.state_dict()), folder / "flux.safetensors")
    vae = AutoencoderKL(block_out_channels=[8] * 4, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                        latent_channels=4, norm_num_groups=4, scaling_factor=0.4, shift_factor=0.2, layers_per_block=1)
    vae.save_pretrained(folder / "vae")
    towers = tuple(miniature_files / "clip_vision" / f"miniature_{name}.safetensors" for name in ("clip", "dinov2"))
    configs = tuple(tower.config for tower in load_towers(towers, (), CPU, torch.float32).values())
    adapter = Adapter(AdapterConfig([[1, 1, 8], [2, 2, 4]], configs, 32, 2, 1, 48, 32))
    checkpoint.save(folder / "adapter.safetensors", adapter.state_dict(), "adapter", adapter.config.to_json(),
                    base_sha256=base_sha256(folder / "flux.safetensors"))
    return Painter(Files(folder / "flux.safetensors", folder / "adapter.safetensors", folder / "vae", towers), CPU, "fp32")


@pytest.fixture(scope="module")
def embedding(painter, photos):
    pictures = to_tensor([photos["chelsea"][:64, :96], photos["coffee"][:64, :96]])
    return painter.embed(pictures, Hierarchy.from_json([[1, 1, 8], [2, 2, 4]]))


def test_a_picture_depends_on_its_own_seed_alone(painter, embedding):
    seeds = [seed_of("a", 0), seed_of("b", 0)]
    assert seeds == [seed_of("a", 0), seed_of("b", 0)] and len({*seeds, seed_of("a", 1), seed_of("b", 1)}) == 4
    both = painter.paint(embedding, (64, 96), seeds, 2, 1.0)
    assert both.shape == (2, 64, 96, 3) and both.dtype == np.uint8
    pooled = embedding.pooled
    assert pooled.shape == (2, 32)
    turned = type(embedding)(embedding.tokens.flip(0), embedding.boxes, embedding.levels, embedding.strengths, pooled.flip(0))
    again = painter.paint(turned, (64, 96), seeds[::-1], 2, 1.0)
    assert np.abs(again[::-1].astype(int) - both).max() <= 1
    assert (painter.paint(embedding, (64, 96), seeds[::-1], 2, 1.0) != both).mean() > 0.5


def test_guidance_reaches_the_base_and_the_mask_its_blocks(painter, embedding):
    plain = painter.paint(embedding, (64, 96), [1, 2], 2, 1.0)
    assert (painter.paint(embedding, (64, 96), [1, 2], 2, 30.0) != plain).any()
    painter.record["masked"] = False
    try:
        assert (painter.paint(embedding, (64, 96), [1, 2], 2, 1.0) != plain).any()
    finally:
        del painter.record["masked"]


def test_the_round_trip_is_the_autoencoders_own(painter, photos):
    pictures = to_tensor([photos["china"][:64, :64]])
    with torch.no_grad():
        own = painter.vae.vae.decode(painter.vae.vae.encode(pictures * 2 - 1).latent_dist.mean).sample
    expected = ((own.clamp(-1, 1) + 1) * 127.5).round().movedim(1, -1).numpy()
    assert np.abs(painter.round_trip(pictures) - expected).max() <= 1


def test_the_files_are_described(painter):
    facts = painter.describe()
    assert facts.keys() == {"flux", "adapter", "vae", "tower miniature_clip.safetensors", "tower miniature_dinov2.safetensors"}
    assert facts["flux"] == f"flux.safetensors, sha256 {base_sha256(painter.files.flux)}"
