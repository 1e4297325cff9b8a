"""Flux in training: diffusers' FluxTransformer2DModel, the key map to ComfyUI's (BFL's) layout, and flow matching.

Flow matching as in Flux: x_t = (1 - t) x_0 + t noise, the model predicts noise - x_0, t in (0, 1).
"""
from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from diffusers import FluxTransformer2DModel
from einops import rearrange
from torch import Tensor, nn


def build_flux(config: dict) -> FluxTransformer2DModel:
    """diffusers' Flux from ComfyUI's field names (see the `flux` checkpoint record)."""
    if config["hidden_size"] % config["num_heads"]:
        raise ValueError(f"hidden_size {config['hidden_size']} is not a multiple of num_heads {config['num_heads']}.")
    return FluxTransformer2DModel(
        patch_size=1, in_channels=config["in_channels"] * config["patch_size"] ** 2, num_layers=config["depth"],
        num_single_layers=config["depth_single_blocks"],
        attention_head_dim=config["hidden_size"] // config["num_heads"],
        num_attention_heads=config["num_heads"], joint_attention_dim=config["context_in_dim"],
        pooled_projection_dim=config["vec_in_dim"], guidance_embeds=config["guidance_embed"],
        axes_dims_rope=tuple(config["axes_dim"]),
    )


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H/2 * W/2, 4 C], the order of Flux's patches."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(patches: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of pack for a grid of rows x cols patches."""
    return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, w=cols, p=2, q=2)


def position_ids(rows: int, cols: int, device=None, index: int = 0) -> Tensor:
    """[rows * cols, 3] float: (index, row, column). Of a reference the index is 1 (FLUX.1 Kontext, arXiv 2506.15742)."""
    grid = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(cols, device=device))
    return torch.cat([torch.full((rows * cols, 1), float(index), device=device), grid.float()], 1)


def velocity(flux: FluxTransformer2DModel, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor,
             guidance: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
    """Predicted noise - x_0 of noisy latents x [B, C, H, W] at times t [B] under context [B, N, D] and pooled [B, P].

    reference [B, C, H, W]: clean latents whose patches stand behind those of x, at the same places.
    guidance [B]: the guidance scale for a guidance-distilled Flux (FLUX.1-dev); None for a Flux without one. A Flux
    held in half precision computes in it from end to end, whatever autocast would do. x is then mixed for
    `network_time`.
    """
    rows, cols = x.shape[-2] // 2, x.shape[-1] // 2
    dtype, device = flux.x_embedder.weight.dtype, x.device.type
    half = dtype != torch.float32
    if half:
        x, t, context, pooled = x.to(dtype), t.to(dtype), context.to(dtype), pooled.to(dtype)
    patches, ids = pack(x), position_ids(rows, cols, x.device)
    if reference is not None:
        patches = torch.cat([patches, pack(reference.to(x.dtype))], 1)
        ids = torch.cat([ids, position_ids(rows, cols, x.device, index=1)])
    with torch.autocast(device, enabled=False) if half else nullcontext():
        out = flux(hidden_states=patches, timestep=t, encoder_hidden_states=context, pooled_projections=pooled,
                   img_ids=ids, txt_ids=context.new_zeros(context.shape[1], 3),
                   guidance=guidance, return_dict=False)[0]
    return unpack(out[:, :rows * cols], rows, cols)


def network_time(flux: FluxTransformer2DModel, t: Tensor) -> Tensor:
    """Times t as the network reads them, in t's dtype.

    diffusers passes 1000 t in the network's own dtype, and bf16 has eight bits. Noisy latents are mixed for these
    times, so that the time matches the noise that is there.
    """
    return (t.to(flux.x_embedder.weight.dtype) * 1000).to(t.dtype) / 1000


def shifted(t: Tensor, mu: float) -> Tensor:
    """Flux's time shift: e^mu / (e^mu + 1/t - 1) (black-forest-labs/flux, sampling.py), of times in (0, 1]."""
    return math.exp(mu) / (math.exp(mu) + 1 / t - 1)


def mu_of(flux: FluxTransformer2DModel, patches: int) -> float:
    """The time shift that the base itself samples with. FLUX.1's grows with the number of image patches, 0.5 at 256 and
    1.15 at 4096 (black-forest-labs/flux, sampling.py). A base with its own shift in its config keeps that."""
    own = flux.config.get("sampling_shift_mu")
    return 0.5 + (1.15 - 0.5) * (patches - 256) / (4096 - 256) if own is None else own


class Tap:
    """Keep the image stream that a block of Flux returned in the latest forward: `value` [B, P, hidden]."""

    def __init__(self, block: nn.Module):
        self.value: Tensor | None = None
        block.register_forward_hook(self._keep)

    def _keep(self, module, args, output) -> None:
        self.value = output[1]


_DOUBLE = {  # diffusers name -> BFL name, parts are concatenated in this order
    "img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",), "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",),
}
_DOUBLE_NORMS = {"img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
                 "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k"}
_SINGLE = {"modulation.lin": ("norm.linear",), "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
           "linear2": ("proj_out",)}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_STREAMS = (("double_blocks", "transformer_blocks", _DOUBLE, _DOUBLE_NORMS),
            ("single_blocks", "single_transformer_blocks", _SINGLE, _SINGLE_NORMS))
_OUTSIDE = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
            "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2"}
# BFL stores (shift, scale), diffusers (scale, shift).
_FINAL_MODULATION = ("final_layer.adaLN_modulation.1", "norm_out.linear")


def _blocks(state: dict, mark: str) -> int:
    return 1 + max((int(k.split(".")[1]) for k in state if k.startswith(f"{mark}.")), default=-1)


def to_bfl(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers state dict -> the key layout of BFL's files, which ComfyUI loads. Works at any width."""
    out: dict[str, Tensor] = {}

    def join(target: str, names: list[str]) -> None:
        for kind in ("weight", "bias"):
            parts = [state[f"{n}.{kind}"] for n in names if f"{n}.{kind}" in state]
            if parts:
                out[f"{target}.{kind}"] = torch.cat(parts)

    for target, name in _OUTSIDE.items():
        join(target, [name])
    for kind in ("weight", "bias"):
        scale, shift = state[f"{_FINAL_MODULATION[1]}.{kind}"].chunk(2)
        out[f"{_FINAL_MODULATION[0]}.{kind}"] = torch.cat([shift, scale])
    for theirs, ours, table, norms in _STREAMS:
        for i in range(_blocks(state, ours)):
            for target, names in table.items():
                join(f"{theirs}.{i}.{target}", [f"{ours}.{i}.{n}" for n in names])
            for target, name in norms.items():
                out[f"{theirs}.{i}.{target}.scale"] = state[f"{ours}.{i}.{name}.weight"]
    return out


def from_bfl(state: dict[str, Tensor], hidden: int) -> dict[str, Tensor]:
    """The inverse of to_bfl. hidden: width of the streams, needed to cut the joint projections."""
    out: dict[str, Tensor] = {}

    def cut(source: str, names: list[str]) -> None:
        for kind in ("weight", "bias"):
            whole = state.get(f"{source}.{kind}")
            if whole is not None:
                sizes = [hidden] * (len(names) - 1)
                parts = whole.split([*sizes, whole.shape[0] - sum(sizes)])
                out.update({f"{n}.{kind}": p.contiguous() for n, p in zip(names, parts)})

    for source, name in _OUTSIDE.items():
        cut(source, [name])
    for kind in ("weight", "bias"):
        shift, scale = state[f"{_FINAL_MODULATION[0]}.{kind}"].chunk(2)
        out[f"{_FINAL_MODULATION[1]}.{kind}"] = torch.cat([scale, shift])
    for theirs, ours, table, norms in _STREAMS:
        for i in range(_blocks(state, theirs)):
            for source, names in table.items():
                cut(f"{theirs}.{i}.{source}", [f"{ours}.{i}.{n}" for n in names])
            for source, name in norms.items():
                out[f"{ours}.{i}.{name}.weight"] = state[f"{theirs}.{i}.{source}.scale"]
    return out
