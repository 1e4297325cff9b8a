"""The files of a base of our own (Flux, its text encoder, its VAE): their records compared with their tensors.

ComfyUI's core builds the networks. A record that contradicts its tensors is refused here, before core reads it.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from annotated_types import Len
from pydantic import model_validator
from torch import Tensor

from . import checkpoint, schema
from .schema import Flag, Heads, Layers, Number, Patch, Positive, Share, Side, Width, whole

Shapes = dict[str, tuple[int, ...]]


class Latent(schema.Closed):
    """(z - shift) * scale is what the network sees; downsample: pixels per latent pixel."""

    channels: Width
    scale: Positive
    shift: Number
    downsample: Patch


class FluxConfig(schema.Closed):
    """Flux at any width, in the words of core's detection, its latent and the shift of its schedule."""

    hidden_size: Width
    num_heads: Heads
    depth: Layers
    depth_single_blocks: Layers
    axes_dim: Annotated[tuple[Width, ...], Len(1, 4)]
    context_in_dim: Width
    vec_in_dim: Width
    in_channels: Width
    mlp_ratio: Positive
    theta: whole(1, 10**9)
    qkv_bias: Flag
    guidance_embed: Flag
    patch_size: Patch
    latent: Latent
    sampling_shift_mu: Number

    @model_validator(mode="after")
    def _agrees(self) -> FluxConfig:
        head, left = divmod(self.hidden_size, self.num_heads)
        if left or sum(self.axes_dim) != head or any(dim % 2 for dim in self.axes_dim):
            raise ValueError(
                f"A Flux of width {self.hidden_size} with {self.num_heads} heads cannot have the axes {list(self.axes_dim)}: export the "
                "file again."
            )
        return self

    def shapes(self) -> Shapes:
        """Every tensor of the network, in core's names."""
        h, mlp, head = self.hidden_size, int(self.hidden_size * self.mlp_ratio), self.hidden_size // self.num_heads
        patch = self.in_channels * self.patch_size**2
        found: Shapes = {}

        def linear(name: str, out: int, into: int, bias: bool = True) -> None:
            found[f"{name}.weight"] = (out, into)
            if bias:
                found[f"{name}.bias"] = (out,)

        embedded = [
            ("time_in", 256),
            ("vector_in", self.vec_in_dim),
            *([("guidance_in", 256)] if self.guidance_embed else []),
        ]
        for name, into in embedded:
            linear(f"{name}.in_layer", h, into)
            linear(f"{name}.out_layer", h, h)
        linear("img_in", h, patch)
        linear("txt_in", h, self.context_in_dim)
        linear("final_layer.linear", patch, h)
        linear("final_layer.adaLN_modulation.1", 2 * h, h)
        for i in range(self.depth):
            for name in (f"double_blocks.{i}.img", f"double_blocks.{i}.txt"):
                linear(f"{name}_mod.lin", 6 * h, h)
                linear(f"{name}_attn.qkv", 3 * h, h, self.qkv_bias)
                linear(f"{name}_attn.proj", h, h)
                linear(f"{name}_mlp.0", mlp, h)
                linear(f"{name}_mlp.2", h, mlp)
                found |= {f"{name}_attn.norm.{part}_norm.scale": (head,) for part in ("query", "key")}
        for i in range(self.depth_single_blocks):
            linear(f"single_blocks.{i}.modulation.lin", 3 * h, h)
            linear(f"single_blocks.{i}.linear1", 3 * h + mlp, h)
            linear(f"single_blocks.{i}.linear2", h, h + mlp)
            found |= {f"single_blocks.{i}.norm.{part}_norm.scale": (head,) for part in ("query", "key")}
        return found


class VAEConfig(schema.Closed):
    """diffusers' AutoencoderKL, as much of it as core's builds."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: Width
    sample_size: Side = 512
    block_out_channels: Annotated[tuple[Width, ...], Len(1, 8)]
    layers_per_block: whole(1, 16)
    norm_num_groups: Width = 32
    down_block_types: Annotated[list[Literal["DownEncoderBlock2D"]], Len(0, 8)]
    up_block_types: Annotated[list[Literal["UpDecoderBlock2D"]], Len(0, 8)]
    use_quant_conv: Flag = True
    use_post_quant_conv: Flag = True

    @model_validator(mode="after")
    def _agrees(self) -> VAEConfig:
        blocks = len(self.block_out_channels)
        if (len(self.down_block_types), len(self.up_block_types)) != (blocks, blocks):
            raise ValueError(f"A VAE of {blocks} block widths needs as many down and up blocks: export the file again.")
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            raise ValueError(
                f"A VAE of widths {list(self.block_out_channels)} cannot have norms of {self.norm_num_groups} groups: export "
                "the file again."
            )
        return self

    def shapes(self) -> Shapes:
        """Every tensor of the network, in diffusers' names."""
        widths, found = self.block_out_channels, {}

        def conv(name: str, out: int, into: int, side: int = 3) -> None:
            found[f"{name}.weight"], found[f"{name}.bias"] = (out, into, side, side), (out,)

        def norm(name: str, width: int) -> None:
            found[f"{name}.weight"] = found[f"{name}.bias"] = (width,)

        def resnet(name: str, out: int, into: int) -> None:
            norm(f"{name}.norm1", into)
            conv(f"{name}.conv1", out, into)
            norm(f"{name}.norm2", out)
            conv(f"{name}.conv2", out, out)
            if out != into:
                conv(f"{name}.conv_shortcut", out, into, 1)

        def half(
            name: str, order: tuple[int, ...], kind: str, resnets: int, sampler: str, ends: tuple[int, int]
        ) -> None:
            deepest = widths[-1]
            conv(f"{name}.conv_in", order[0], ends[0])
            for i, width in enumerate(order):
                for j in range(resnets):
                    resnet(f"{name}.{kind}_blocks.{i}.resnets.{j}", width, order[max(i - 1, 0)] if j == 0 else width)
                if i + 1 < len(order):
                    conv(f"{name}.{kind}_blocks.{i}.{sampler}.0.conv", width, width)
            for j in range(2):
                resnet(f"{name}.mid_block.resnets.{j}", deepest, deepest)
            norm(f"{name}.mid_block.attentions.0.group_norm", deepest)
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                found[f"{name}.mid_block.attentions.0.{part}.weight"] = (deepest, deepest)
                found[f"{name}.mid_block.attentions.0.{part}.bias"] = (deepest,)
            norm(f"{name}.conv_norm_out", order[-1])
            conv(f"{name}.conv_out", ends[1], order[-1])

        latent, layers = self.latent_channels, self.layers_per_block
        half("encoder", widths, "down", layers, "downsamplers", (self.in_channels, 2 * latent))
        half("decoder", widths[::-1], "up", layers + 1, "upsamplers", (latent, self.out_channels))
        if self.use_quant_conv:
            conv("quant_conv", 2 * latent, 2 * latent, 1)
        if self.use_post_quant_conv:
            conv("post_quant_conv", latent, latent, 1)
        return found


class T5Config(schema.Closed):
    """transformers' T5 encoder."""

    d_model: Width
    d_kv: Width
    d_ff: Width
    num_heads: Heads
    num_layers: Layers
    vocab_size: Width
    feed_forward_proj: schema.Name
    relative_attention_num_buckets: whole(2, 1024) = 32
    relative_attention_max_distance: whole(2, 2**16) = 128
    dropout_rate: Share = 0.1
    pad_token_id: whole(0, 2**63) = 0
    eos_token_id: whole(0, 2**63) = 1


class TextEncoderConfig(schema.Closed):
    """A T5 over words. length: tokens of a prompt, padded."""

    t5: T5Config
    vocabulary: Annotated[list[schema.Name], Len(1, 2**17)]
    length: whole(1, 4096)

    @model_validator(mode="after")
    def _agrees(self) -> TextEncoderConfig:
        if len(set(self.vocabulary)) != len(self.vocabulary) or len(self.vocabulary) != self.t5.vocab_size:
            raise ValueError(
                f"A text encoder of {self.t5.vocab_size} words has {len(set(self.vocabulary))} different ones: export the file again."
            )
        return self

    def shapes(self) -> Shapes:
        """Every tensor of the network, in transformers' names."""
        t5, inner = self.t5, self.t5.num_heads * self.t5.d_kv
        words = (t5.vocab_size, t5.d_model)
        found: Shapes = {
            "shared.weight": words,
            "encoder.embed_tokens.weight": words,
            "encoder.final_layer_norm.weight": (t5.d_model,),
        }
        attention = "encoder.block.{}.layer.0.SelfAttention"
        found[f"{attention.format(0)}.relative_attention_bias.weight"] = (
            t5.relative_attention_num_buckets,
            t5.num_heads,
        )
        for i in range(t5.num_layers):
            found |= {f"{attention.format(i)}.{part}.weight": (inner, t5.d_model) for part in "qkv"}
            found[f"{attention.format(i)}.o.weight"] = (t5.d_model, inner)
            dense = f"encoder.block.{i}.layer.1.DenseReluDense"
            found |= {f"{dense}.{part}.weight": (t5.d_ff, t5.d_model) for part in ("wi_0", "wi_1")}
            found[f"{dense}.wo.weight"] = (t5.d_model, t5.d_ff)
            found |= {f"encoder.block.{i}.layer.{j}.layer_norm.weight": (t5.d_model,) for j in range(2)}
        return found


CONFIGS = {"flux": FluxConfig, "vae": VAEConfig, "text_encoder": TextEncoderConfig}


def load(path: str | os.PathLike, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`checkpoint.load` of a file of one of the kinds in CONFIGS, if its record and its tensors agree."""
    tensors, record = checkpoint.load(path, kind)
    shapes = schema.parse(CONFIGS[kind], record["config"], f"The record in {path}").shapes()
    for name in sorted(shapes.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{path} lacks {name!r}, which its record implies: export it again.")
        if name not in shapes:
            raise ValueError(
                f"{path} has the tensor {schema.short(name)}, which its record does not imply: export it again."
            )
        found = tensors[name]
        if tuple(found.shape) != shapes[name] or not found.is_floating_point():
            raise ValueError(
                f"{path} has tensors of other shapes than its record says ({name!r} is {found.dtype} {list(found.shape)} instead of "
                f"{list(shapes[name])}): export it again."
            )
    return tensors, record
