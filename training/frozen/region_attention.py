"""diffusers' Flux under a visibility: an attention processor that calls the same kernel as the nodes."""
from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from ...kernels.attention import Regions, masked_attention

# tokens below which one kernel with a bias is faster than region attention's several; on a CPU, two matrix products are
# faster there than PyTorch's fused kernel, above all in the backward
SHORT = 512


class RegionAttention:
    """Attention processor for every block of a FluxTransformer2DModel. `regions` None: plain attention."""

    def __init__(self) -> None:
        self.regions: Regions | None = None

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, image_rotary_emb=None):
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, attn.head_dim))

        q = attn.norm_q(heads(attn.to_q(hidden_states)))
        k = attn.norm_k(heads(attn.to_k(hidden_states)))
        v = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            q = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states))), q], 1)
            k = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states))), k], 1)
            v = torch.cat([heads(attn.add_v_proj(encoder_hidden_states)), v], 1)
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1).to(v.dtype) for x in (q, k))
        out = self.attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type == "cpu" and q.shape[2] <= SHORT:
            return short_attention(q, k, v, None if self.regions is None else self.regions.floored())
        if self.regions is None:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return masked_attention(q, k, v, self.regions, "dense" if q.shape[2] <= SHORT else "auto")


def short_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention by two matrix products. bias [B or 1, 1, S, T] applies to the first T keys."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + torch.nn.functional.pad(bias, (0, k.shape[2] - bias.shape[-1])).to(scores.dtype)
    return scores.float().softmax(-1).to(v.dtype) @ v


def attend_by_region(flux: FluxTransformer2DModel) -> RegionAttention:
    """Put one shared RegionAttention into every block; set its `.regions` before a forward."""
    processor = RegionAttention()
    flux.set_attn_processor(processor)
    return processor
