from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training.frozen.flux import (  # noqa: E402
    build_flux,
    from_bfl,
    pack,
    to_bfl,
    unpack,
    velocity,
)
from semantic_diffusion_adapter.training.frozen.region_attention import attend_by_region  # noqa: E402

CONFIG = dict(hidden_size=24, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[4, 4, 4], context_in_dim=10,
              vec_in_dim=6, in_channels=4, guidance_embed=False, patch_size=2)


def toy(**fields):
    torch.manual_seed(0)
    flux = build_flux(CONFIG | fields).eval()
    for parameter in flux.parameters():  # norms and biases start as ones and zeros, which would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.2)
    return flux


def inputs(batch: int = 2):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(batch, 4, 4, 6, generator=generator), torch.tensor([0.3, 0.9])[:batch],
            torch.randn(batch, 5, 10, generator=generator), torch.randn(batch, 6, generator=generator))


def bfl_velocity(w: dict, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Flux's forward as the paper's reference code has it, written from the BFL key layout alone."""
    heads, axes = CONFIG["num_heads"], CONFIG["axes_dim"]

    def linear(name, value):
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def embed(name, value):
        return linear(f"{name}.out_layer", F.silu(linear(f"{name}.in_layer", value)))

    def norm(value):
        return F.layer_norm(value, value.shape[-1:], eps=1e-6)

    def modulation(name, count):
        return linear(name, F.silu(vec))[:, None].chunk(count, -1)

    def split(qkv, name):
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return (F.rms_norm(q, q.shape[-1:], w[f"{name}.query_norm.scale"], 1e-6),
                F.rms_norm(k, k.shape[-1:], w[f"{name}.key_norm.scale"], 1e-6), v)

    def attend(q, k, v):
        def turn(value):
            a, b = value.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([angles.cos() * a - angles.sin() * b, angles.sin() * a + angles.cos() * b], -1).flatten(-2)

        weights = (turn(q) @ turn(k).transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    phase = 1000 * t[:, None] * frequencies
    vec = embed("time_in", torch.cat([phase.cos(), phase.sin()], -1)) + embed("vector_in", pooled)
    rows, cols = x.shape[-2] // 2, x.shape[-1] // 2
    ids = torch.cat([torch.zeros(context.shape[1], 3), torch.tensor([[0, i, j] for i in range(rows) for j in range(cols)])])
    angles = torch.cat([ids[:, a, None] / 10000 ** (torch.arange(0, d, 2) / d) for a, d in enumerate(axes)], -1)
    img, txt = linear("img_in", pack(x)), linear("txt_in", context)
    length = txt.shape[1]
    for i in range(CONFIG["depth"]):
        streams = {}
        for side, value in (("txt", txt), ("img", img)):
            mods = modulation(f"double_blocks.{i}.{side}_mod.lin", 6)
            qkv = linear(f"double_blocks.{i}.{side}_attn.qkv", (1 + mods[1]) * norm(value) + mods[0])
            streams[side] = (mods, split(qkv, f"double_blocks.{i}.{side}_attn.norm"))
        out = attend(*(torch.cat(pair, 2) for pair in zip(streams["txt"][1], streams["img"][1])))
        for side, part in (("txt", out[:, :length]), ("img", out[:, length:])):
            mods, value = streams[side][0], txt if side == "txt" else img
            value = value + mods[2] * linear(f"double_blocks.{i}.{side}_attn.proj", part)
            hidden = linear(f"double_blocks.{i}.{side}_mlp.0", (1 + mods[4]) * norm(value) + mods[3])
            value = value + mods[5] * linear(f"double_blocks.{i}.{side}_mlp.2", F.gelu(hidden, approximate="tanh"))
            txt, img = (value, img) if side == "txt" else (txt, value)
    both = torch.cat([txt, img], 1)
    for i in range(CONFIG["depth_single_blocks"]):
        shift, scale, gate = modulation(f"single_blocks.{i}.modulation.lin", 3)
        joint = linear(f"single_blocks.{i}.linear1", (1 + scale) * norm(both) + shift)
        qkv, hidden = joint.split([3 * CONFIG["hidden_size"], 4 * CONFIG["hidden_size"]], -1)
        out = attend(*split(qkv, f"single_blocks.{i}.norm"))
        both = both + gate * linear(f"single_blocks.{i}.linear2", torch.cat([out, F.gelu(hidden, approximate="tanh")], -1))
    shift, scale = modulation("final_layer.adaLN_modulation.1", 2)
    return unpack(linear("final_layer.linear", (1 + scale) * norm(both[:, length:]) + shift), rows, cols)


@torch.no_grad()
def test_the_bfl_layout_paints_the_same():
    """One velocity from diffusers' Flux, and from its weights in BFL's layout through BFL's own equations."""
    flux = toy()
    expected = velocity(flux, *inputs())
    torch.testing.assert_close(bfl_velocity(to_bfl(flux.state_dict()), *inputs()), expected, rtol=1e-4, atol=1e-5)
    attend_by_region(flux)
    torch.testing.assert_close(velocity(flux, *inputs()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance", [False, True])
def test_the_key_map_goes_there_and_back(guidance):
    state = toy(guidance_embed=guidance).state_dict()
    bfl = to_bfl(state)
    back = from_bfl(bfl, CONFIG["hidden_size"])
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    again = to_bfl(back)
    assert again.keys() == bfl.keys() and all(torch.equal(again[k], bfl[k]) for k in bfl)
    assert ("guidance_in.in_layer.weight" in bfl) == guidance
    assert bfl["double_blocks.0.img_attn.qkv.weight"].shape == (72, 24)


def test_packing_is_undone_and_has_fluxs_order():
    x = torch.randn(2, 3, 4, 6)
    patches = pack(x)
    assert patches.shape == (2, 6, 12) and torch.equal(unpack(patches, 2, 3), x)
    assert torch.equal(patches[0, 4], x[0, :, 2:4, 2:4].flatten())


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="hidden_size 25 is not a multiple of num_heads 2"):
        build_flux(CONFIG | {"hidden_size": 25})
