"""Towers and VAE from every kind of file, and Euler's method on top of them."""
from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from diffusers import AutoencoderKL  # noqa: E402
from semantic_diffusion_adapter.kernels import checkpoint  # noqa: E402
from semantic_diffusion_adapter.kernels.adapter import AdapterConfig  # noqa: E402
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS  # noqa: E402
from semantic_diffusion_adapter.kernels.vision.known import KNOWN_TOWERS  # noqa: E402
from semantic_diffusion_adapter.kernels.vision.towers import TowerConfig, build_tower  # noqa: E402
from semantic_diffusion_adapter.training.files import file_hash  # noqa: E402
from semantic_diffusion_adapter.training.frozen import encoders  # noqa: E402
from semantic_diffusion_adapter.training.frozen.flux import build_flux, mu_of, velocity  # noqa: E402
from semantic_diffusion_adapter.training.frozen.paint import paint, schedule, starting_noise  # noqa: E402
from semantic_diffusion_adapter.training.frozen.region_attention import attend_by_region  # noqa: E402
from semantic_diffusion_adapter.training.objectives.reconstruct import regions_for  # noqa: E402

CPU = torch.device("cpu")
ARCHITECTURE = dict(in_channels=3, out_channels=3, latent_channels=4, layers_per_block=2, block_out_channels=[32, 32, 64],
                    down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, norm_num_groups=32,
                    use_quant_conv=False, use_post_quant_conv=False)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**ARCHITECTURE, scaling_factor=0.3611, shift_factor=0.1159).eval().requires_grad_(False)


def bfl_names(state: dict) -> dict:
    """The layout of ae.safetensors, spelled out: levels of the decoder count from the finest, attention is of convolutions."""
    out = {}
    for name, value in state.items():
        name = re.sub(r"encoder\.down_blocks\.(\d)\.resnets", r"encoder.down.\1.block", name)
        name = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
        name = re.sub(r"decoder\.up_blocks\.(\d)", lambda m: f"decoder.up.{2 - int(m[1])}", name)
        name = name.replace("upsamplers.0", "upsample").replace("resnets", "block").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"mid_block\.block\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm").replace("to_out.0", "proj_out")
        name = re.sub(r"\.to_([qkv])\.", r".\1.", name).replace("conv_norm_out", "norm_out")
        out[name] = value[..., None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) else value
    return out


@pytest.mark.parametrize("kind", ["single file", "folder", "ours"])
def test_the_vae_of_every_kind_of_file_scales_its_latents_as_flux_takes_them(tmp_path, vae, kind):
    path, scale, shift = tmp_path / "ae.safetensors", 0.3611, 0.1159
    if kind == "single file":
        save_file({k: v.contiguous() for k, v in bfl_names(vae.state_dict()).items()}, path)
    elif kind == "folder":
        path = tmp_path
        vae.save_pretrained(path / "vae")
    else:
        checkpoint.save(path, vae.state_dict(), "vae", ARCHITECTURE)
        scale, shift = 1.0, 0.0
    latents = encoders.load_vae(path, CPU)
    assert (latents.channels, latents.downsample) == (4, 4)
    images = torch.rand(2, 3, 32, 48)
    mean, std = latents.moments(images)
    truth = vae.encode(images * 2 - 1).latent_dist
    torch.testing.assert_close(mean, (truth.mean - shift) * scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, truth.std * scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latents.decode(mean), (vae.decode(truth.mean).sample / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-4)
    assert not any(p.requires_grad for p in latents.vae.parameters())


def test_what_is_no_vae_is_refused(tmp_path, vae):
    save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is no VAE in the layout of ae.safetensors"):
        encoders.load_vae(tmp_path / "a.safetensors", CPU)
    with pytest.raises(ValueError, match="has no vae/config.json"):
        encoders.load_vae(tmp_path, CPU)
    state = bfl_names(vae.state_dict())
    del state["decoder.conv_out.bias"]
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="cut.safetensors does not fit .*conv_out.bias"):
        encoders.load_vae(tmp_path / "cut.safetensors", CPU)


TOWER = TowerConfig("toy", "dinov2", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
                                      "patch_size": 14, "mlp_ratio": 2}, 28, 14, 16, (0.5,) * 3, (0.5,) * 3)


def test_towers_come_from_our_files_and_from_published_folders(tmp_path, monkeypatch):
    tower = build_tower(TOWER)
    checkpoint.save(tmp_path / "ours.safetensors", tower.model.state_dict(), "vision_tower", TOWER.to_json())
    monkeypatch.setitem(KNOWN_TOWERS, "public", TowerConfig.from_json({**TOWER.to_json(), "id": "public"}))
    tower.model.save_pretrained(tmp_path / "public")
    found = encoders.load_towers((tmp_path / "ours.safetensors", tmp_path / "public"), ("", "public"), CPU, torch.float32)
    assert list(found) == ["toy", "public"]
    images = torch.rand(1, 3, 40, 50)
    for each in found.values():
        assert torch.equal(each(images), tower(images)) and not any(p.requires_grad for p in each.parameters())


def test_towers_that_cannot_be_are_refused(tmp_path):
    file = tmp_path / "public.safetensors"
    save_file({"weight": torch.zeros(1)}, file)
    for files, ids, words in (((file,), (), "does not say which encoder it is"), ((file,), ("dino",), "There is no vision tower 'dino'"),
                              ((file, file), ("x",), r"do not pair up \(2 and 1\)")):
        with pytest.raises(ValueError, match=words):
            encoders.load_towers(files, ids, CPU, torch.float32)


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    made = build_flux(dict(hidden_size=24, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[4, 4, 4], context_in_dim=10,
                           vec_in_dim=6, in_channels=4, guidance_embed=True, patch_size=2)).eval().requires_grad_(False)
    attend_by_region(made)
    return made


def test_the_time_shift_is_fluxs(flux):
    assert [round(mu_of(flux, n), 4) for n in (256, 1024, 4096)] == [0.5, 0.63, 1.15]
    flux.register_to_config(sampling_shift_mu=0.9)
    assert mu_of(flux, 4096) == 0.9
    flux.register_to_config(sampling_shift_mu=None)
    times = schedule(4, 1.15)
    assert times[0] == pytest.approx(1) and times[-1] == 0 and times == sorted(times, reverse=True)
    assert times[2] == pytest.approx(3.1582 / 4.1582, abs=1e-4)


def test_painting_is_eulers_method(flux, vae):
    """Two steps by hand, one picture at a time, equal a batch painted at once."""
    latents = encoders.Latents(vae)
    torch.manual_seed(3)
    tokens, pooled = torch.randn(2, 64, 10), torch.randn(2, 6)
    regions = regions_for(PRESETS["tree64"], (4, 6), CPU)
    found = paint(flux, latents, tokens, pooled, regions, 32, 48, seed=5, steps=2, guidance=2.0)
    assert found.shape == (2, 3, 32, 48) and next(iter(flux.attn_processors.values())).regions is None
    middle = schedule(2, mu_of(flux, 24))[1]
    for i in range(2):
        next(iter(flux.attn_processors.values())).regions = regions
        x = starting_noise([5 + i], 4, 8, 12)
        for now, later in ((1.0, middle), (middle, 0.0)):
            x = x + (later - now) * velocity(flux, x, torch.tensor([now]), tokens[i:i + 1], pooled[i:i + 1], torch.tensor([2.0]))
        torch.testing.assert_close(found[i:i + 1], latents.decode(x), rtol=1e-4, atol=1e-4)
    everything = paint(flux, latents, tokens, pooled, None, 32, 48, seed=5, steps=2, guidance=2.0)
    assert (everything - found).abs().max() > 1e-4, "the visibility must matter"
    assert (paint(flux, latents, tokens, pooled, regions, 32, 48, seed=5, steps=2, guidance=4.0) - found).abs().max() > 1e-5
    with pytest.raises(ValueError, match="30 x 48 pixels cannot be cut into patches of 8"):
        paint(flux, latents, tokens, None, None, 30, 48)


def test_only_the_towers_of_an_adapter_look_for_it(tmp_path):
    """Its DINOv2 too: the very file where the record has its hash, one of the same run and step where it was tuned."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "mlp_ratio": 2}
    config = TowerConfig("dino", "dinov2", shape, 28, 14, 16, (0.5,) * 3, (0.5,) * 3)
    own, other, plain = (tmp_path / f"{name}.safetensors" for name in ("own", "other", "plain"))
    for path, facts in ((own, {"run": "mine", "step": 4}), (other, {"run": "mine", "step": 5}), (plain, {})):
        checkpoint.save(path, build_tower(config).model.state_dict(), "vision_tower", config.to_json(), **facts)
    adapter = AdapterConfig(PRESETS["global16"].to_json(), (config,), 16, 2, 1, 8).to_json()
    tuned = {"config": adapter, "run": "mine", "step": 4, "towers": {"dino": "tuned: own.safetensors"}}
    hashed = {"config": adapter, "dinov2_sha256": file_hash(own)}
    for record in (tuned, hashed):
        encoders.check_towers([(own, "")], tmp_path / "adapter", record)
        for wrong in (other, plain):
            with pytest.raises(ValueError, match=f"{wrong.name} is not the 'dino' that was tuned with .*adapter; give the one"):
                encoders.check_towers([(wrong, "")], tmp_path / "adapter", record)
    encoders.check_towers([(plain, "")], tmp_path / "adapter", {**tuned, "towers": {"dino": "0" * 64}})
    with pytest.raises(ValueError, match=r"looks through 'dino', which is not among the towers \(dinov2-large-378\)"):
        encoders.check_towers([(plain, "dinov2-large-378")], tmp_path / "adapter", tuned)
