"""The cost of an adapter training or of a fit from the shapes alone: parameters, FLOPs and memory of one step. Tests
check it against PyTorch's counts, and `run.py bench plan` against the machine at hand.

FLOPs follow torchtitan's correction for Flux. A token passes through one stream of each double block, so it meets about
6.5 of the 12 billion weights, and the modulation is computed once for a sample. The base is frozen: its backward
computes the gradient of inputs but not of weights. So a step costs twice the forward, or three times with
checkpointing.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ...kernels.adapter import AdapterConfig
from ...kernels.vision.towers import TowerConfig
from ..frozen.base import LIBRARY, is_quantised

FLUX1_DEV = dict(hidden_size=3072, num_heads=24, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56],
                 context_in_dim=4096,
                 vec_in_dim=768, in_channels=16, patch_size=2, guidance_embed=True)
FLUX1_VAE = dict(latent_channels=16, block_out_channels=[128, 256, 512, 512], layers_per_block=2)
VAE_PARAMETERS = 83_819_683
T5_PARAMETERS = 4_762_310_656  # the encoder of T5 v1.1 XXL
# bytes of a checkpoint for each number that learns: itself, its average and Adam's two moments, in float32
LEARNING = 16
# Bytes of a weight. int8: one bf16 scale a row; nf4: half a byte, one byte a block of 64 for its scale and 1/64 of that
# again.
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / 256 / 64}
# Bytes that a block of each kind keeps for its backward, for each token and channel, in bf16 (measured by saved-tensor
# hooks).
KEPT = {"double": 40, "single": 34}
# What it keeps beside that where its picture's layers have a LoRA: peft copies a layer's input to float32 for each of them. Under
# autocast half of it.
KEPT_BY_LORA = {"double": 28, "single": 33}


@dataclass(frozen=True)
class Flops:
    """FLOPs of one sample, by part. A multiply and an add count as two."""

    forward: float
    backward: float
    recomputed: float
    encoders: float
    """Towers and VAE, forward only."""
    adapter: float

    @property
    def base(self) -> float:
        return self.forward + self.backward + self.recomputed

    @property
    def total(self) -> float:
        return self.base + self.encoders + self.adapter


def flux_flops(flux, patches: int, tokens: int, checkpointing: bool, pooled: bool = True) -> tuple[float, float, float]:
    """(forward, backward, recomputed) FLOPs of one sample through a frozen Flux.

    flux: a FluxTransformer2DModel.config. pooled: whether the pooled vector learns, so that a gradient passes through
    the modulation.
    """
    h, s = flux.num_attention_heads * flux.attention_head_dim, patches + tokens
    doubles, singles = flux.num_layers, flux.num_single_layers
    streams = 12 * h * h * s * (doubles + singles)  # qkv 3, out 1, feed-forward 8; a single block fuses the same
    attention = 2 * s * s * h * (doubles + singles)
    modulation = (12 * doubles + 3 * singles) * h * h
    edges = flux.joint_attention_dim * h * tokens + flux.in_channels * h * patches
    times = (256 * h + h * h) * (2 if flux.guidance_embeds else 1)
    vector = flux.pooled_projection_dim * h + h * h
    last = 2 * h * h
    forward = streams + attention + modulation + edges + patches * flux.in_channels * h + times + vector + last
    # The noisy picture gets no gradient, so the first block's picture stream passes none through its q, k and v.
    unused = 3 * h * h * patches if doubles else 0
    backward = streams - unused + 2 * attention + flux.joint_attention_dim * h * tokens + patches * flux.in_channels * h
    backward += (modulation + vector + last) if pooled else 0
    again = (streams + attention + modulation) if checkpointing else 0
    return 2.0 * forward, 2.0 * backward, 2.0 * again


def lora_flops(layers: dict[str, nn.Linear], rank: int, patches: int, tokens: int) -> float:
    """FLOPs of the forward of one sample through the LoRA of these layers of a Flux; its backward takes twice that."""
    total = 0.0
    for name, layer in layers.items():
        length = patches + (tokens if name.startswith("single") else 0)
        total += length * rank * (layer.in_features + layer.out_features)
    return 2.0 * total


def adapter_flops(config: AdapterConfig, queries: int) -> float:
    """Forward and backward of one sample through the adapter; the towers' features need no gradient."""
    width, patches = config.width, config.towers[0].grid[0] * config.towers[0].grid[1]
    entry = sum(t.width * width * patches for t in config.towers)
    fusion = len(config.towers) * width * width * patches
    layer = (4 + 2 + 8) * width * width * queries + 2 * width * width * patches + 2 * width * queries * (queries + patches)
    heads = queries * width * config.out_dim + (width * (width + config.pooled_dim) if config.pooled_dim else 0)
    return 2.0 * (2 * entry + 3 * (fusion + config.layers * layer + heads))


def tower_layers(config: TowerConfig) -> int:
    shape = config.architecture.get("vision_cfg", config.architecture)
    # open_clip configures a SigLIP by timm's name; so400m has 27 layers
    return shape.get("num_hidden_layers") or shape.get("layers") or 27


def tower_parameters(config: TowerConfig) -> float:
    """Parameters of a vision transformer, to a few percent: 12 width^2 per layer, and the patch embedding."""
    return 12.0 * tower_layers(config) * config.width ** 2 + 3 * config.patch ** 2 * config.width


def tower_flops(config: TowerConfig) -> float:
    """FLOPs of the forward of one picture, to a few percent."""
    patches = config.grid[0] * config.grid[1]
    return 2.0 * tower_parameters(config) * patches + 4.0 * tower_layers(config) * patches ** 2 * config.width


def vae_flops(config, height: int, width: int) -> float:
    """FLOPs of the forward of one picture through the encoder of an AutoencoderKL with this config."""
    get = config.get
    widths, pixels, inside = get("block_out_channels"), height * width, get("block_out_channels")[0]
    total = 9.0 * 3 * inside * pixels
    for level, out in enumerate(widths):
        for _ in range(get("layers_per_block")):
            total += (9 * (inside * out + out * out) + (inside * out if inside != out else 0)) * pixels
            inside = out
        if level + 1 < len(widths):
            pixels //= 4
            total += 9 * out * out * pixels
    total += (4 * 9 + 4) * inside * inside * pixels + 2 * pixels * pixels * inside + 9 * inside * 2 * get("latent_channels") * pixels
    return 2 * total


def base_bytes(flux: nn.Module, precision: str) -> float:
    """Bytes of the frozen Flux's weights."""
    rest = BYTES["fp32" if precision == "fp32" else "bf16"]
    total = 0.0
    for name, module in flux.named_modules():
        held = isinstance(module, nn.Linear) and is_quantised(name)
        for leaf, parameter in module.named_parameters(recurse=False):
            small = leaf == "bias" or not held
            total += parameter.numel() * (rest if small else BYTES[precision])
            total += 2 * parameter.shape[0] if held and leaf == "weight" and precision == "int8" else 0
    return total


def activation_bytes(flux, patches: int, tokens: int, micro: int, checkpointing: bool, lora: bool = False) -> float:
    """Bytes of a micro-batch, at most: what the blocks keep for the backward or, with checkpointing, their inputs and
    one block."""
    h = flux.num_attention_heads * flux.attention_head_dim
    one = micro * (patches + tokens) * h
    kept = {kind: KEPT[kind] + lora * KEPT_BY_LORA[kind] for kind in KEPT}
    if checkpointing:
        return one * (2 * (flux.num_layers + flux.num_single_layers) + 2 * max(kept.values()))
    return one * (kept["double"] * (flux.num_layers + 1) + kept["single"] * flux.num_single_layers)


def unpacked_bytes(flux: nn.Module, precision: str, checkpointing: bool) -> float:
    """Bytes, at most, of quantised weights that lie there in bf16 once more. bitsandbytes unpacks a layer whenever it
    is used. torchao's int8 keeps what it has unpacked for the backward: a block with checkpointing, all without."""
    if precision not in LIBRARY:
        return 0.0
    blocks = [*flux.transformer_blocks, *flux.single_transformer_blocks]
    if precision == "nf4":
        return 2.0 * max(parameter.numel() for block in blocks for parameter in block.parameters())
    return 2.0 * (max if checkpointing else sum)(map(parameters, blocks))


def vae_working_bytes(pixels: int) -> float:
    """Bytes of the VAE's largest layer at work on one picture."""
    return 3.0 * 2 * 128 * pixels * 2


def fit_bytes(flux: nn.Module, precision: str, patches: int, tokens: int, batch: int,
              checkpointing: bool) -> dict[str, float]:
    """Bytes of a card during the fit of `batch` embeddings through a frozen Flux (on the meta device), by part.

    Text encoder, towers and adapter work on the CPU. The VAE works before the first step.
    """
    config = flux.config
    learning = tokens * config.joint_attention_dim + config.pooled_projection_dim
    activations = activation_bytes(config, patches, tokens, batch, checkpointing)
    unpacked = unpacked_bytes(flux, precision, checkpointing)
    return {
        "frozen base": base_bytes(flux, precision),
        "VAE": 2.0 * VAE_PARAMETERS,
        # value, average and Adam's two moments, their gradient and a step's copies, in float32
        "embeddings and Adam": 4.0 * 8 * batch * learning,
        "activations of the base": activations,
        "weights unpacked": unpacked,
        "VAE at work, beyond a step": max(0.0, vae_working_bytes(16 * 16 * patches) - activations - unpacked),
    }


def adapter_activation_bytes(config: AdapterConfig, micro: int) -> float:
    """Bytes of a micro-batch that the adapter's layers keep under autocast: per layer and channel about 60 for a query
    and 14 for a patch."""
    queries = sum(r * c * t for r, c, t in config.hierarchy)
    patches = config.towers[0].grid[0] * config.towers[0].grid[1]
    return micro * config.width * (60 * config.layers * queries
                                   + (14 * config.layers + 20 * len(config.towers)) * patches)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
