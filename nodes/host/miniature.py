"""The miniature's MODEL, CLIP and VAE: the real classes of core at toy width, from the files in assets/miniature."""

from __future__ import annotations

from pathlib import Path

import comfy.diffusers_convert
import comfy.latent_formats
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import numpy as np
import torch
from comfy.patcher_extension import WrappersMP
from PIL import Image

from ...kernels import base_files, checkpoint
from . import folders
from .saying import warn
from .text_encoder import load_clip

FLUX = "diffusion_models/miniature_flux.safetensors"
TEXT_ENCODER = "text_encoders/miniature_t5.safetensors"
VAE = "vae/miniature_vae.safetensors"
GATE = "loras/miniature_gate.safetensors"  # in no combo: core's Load LoRA would offer it for FLUX.1
SCENE = "scene.png"
SIDE = 128  # pixels of the pictures that all of it has learnt from
# By the model folder in whose combo they appear.
CLIP_ENCODER = ("clip_vision", "miniature_clip.safetensors")
DINOV2_ENCODER = ("clip_vision", "miniature_dinov2.safetensors")
ADAPTER = ("semantic_adapters", "miniature_tree128.safetensors")
EDIT_DECODER = ("edit_decoders", "miniature_editor.safetensors")

# What core's detection cannot see in the tensors or takes for granted (24 heads of 128).
_OVERRIDDEN = (
    "hidden_size", "num_heads", "depth", "depth_single_blocks", "axes_dim", "context_in_dim", "vec_in_dim",
    "in_channels", "mlp_ratio", "theta", "qkv_bias", "guidance_embed", "patch_size",
)  # fmt: skip


def files() -> list[Path]:
    """Every file that a miniature graph reads."""
    named = [f"{folder}/{name}" for folder, name in (CLIP_ENCODER, DINOV2_ENCODER, ADAPTER, EDIT_DECODER)]
    return [folders.MINIATURE / name for name in (FLUX, TEXT_ENCODER, VAE, GATE, SCENE, *named)]


def load():
    """(MODEL, CLIP, VAE). ValueError names a file that is missing or does not fit."""
    for path in files():
        if not path.is_file():
            raise ValueError(
                f"The miniature's {path.name} is missing from {path.parent}: install the pack again, or train it with `sda`."
            )
    root = folders.MINIATURE
    return load_flux(str(root / FLUX)), load_clip(str(root / TEXT_ENCODER)), load_vae(str(root / VAE))


def with_gate_lora(model):
    """The MODEL with the LoRA that reads a source picture by a gate, by core's own loader."""
    tensors, _ = checkpoint.load(folders.MINIATURE / GATE, "gate_lora")
    return comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)[0]


def scene() -> torch.Tensor:
    """The bundled picture as core's IMAGE: [1, SIDE, SIDE, 3] float32 in [0, 1]."""
    with Image.open(folders.MINIATURE / SCENE) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]


class Latent(comfy.latent_formats.LatentFormat):
    """(z - shift) * scale, with the miniature's own numbers."""

    def __init__(self, channels: int, scale: float, shift: float):
        self.latent_channels, self.scale_factor, self.shift_factor = channels, scale, shift

    def process_in(self, latent):
        return (latent - self.shift_factor) * self.scale_factor

    def process_out(self, latent):
        return latent / self.scale_factor + self.shift_factor


def load_flux(path: str):
    """A MODEL of core's own Flux class. Detection fills what this core's Flux wants to know, the record the numbers."""
    tensors, record = base_files.load(path, "flux")
    # Under the dynamic VRAM of newer cores a layer keeps the dtype of the tensor it is given, whatever the model's.
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    numbers = record["config"]
    detected = comfy.model_detection.detect_unet_config(tensors, "")
    detected.update({name: numbers[name] for name in _OVERRIDDEN}, out_channels=numbers["in_channels"])
    config = comfy.supported_models.Flux(detected)
    latent = numbers["latent"]
    config.latent_format = Latent(latent["channels"], latent["scale"], latent["shift"])
    config.sampling_settings = {"shift": numbers["sampling_shift_mu"]}
    config.set_inference_dtype(torch.float32, None)
    offload = comfy.model_management.unet_offload_device()
    model = config.get_model(tensors, "").to(offload)
    named = config.process_unet_state_dict(tensors)
    # Core's own way: newer cores build layers without weights, which only this creates.
    model.load_model_weights(dict(tensors), "")
    _check_names(model.diffusion_model, named, path)
    device = comfy.model_management.get_torch_device()
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "sda_miniature", size_wrapper)
    return patcher


def size_wrapper(executor, noise, latent_image, *rest, **more):
    """Says once for a sampling that another size than the learnt one is asked for."""
    height, width = (8 * cells for cells in latent_image.shape[-2:])
    if (height, width) != (SIDE, SIDE):
        warn(
            f"The miniature has learnt pictures of {SIDE} x {SIDE} pixels only and is asked for {width} x {height}: what it paints "
            f"may be torn. Give it a latent of {SIDE} x {SIDE}."
        )
    return executor(noise, latent_image, *rest, **more)


def load_vae(path: str):
    """A VAE of core's AutoencoderKL from a diffusers one, in float32."""
    tensors, record = base_files.load(path, "vae")
    settings = record["config"]
    blocks, channels = settings["block_out_channels"], settings["latent_channels"]
    if any(width % blocks[0] or width % 32 for width in blocks) or len(blocks) != 4:
        raise ValueError(f"{path} has blocks of {blocks}: ComfyUI's VAE takes four, multiples of the first and of 32.")
    converted = {name: t.float() for name, t in comfy.diffusers_convert.convert_vae_state_dict(tensors).items()}
    # Core builds a VAE of given widths only with quantisation convolutions; the identity stands for none.
    for name, width in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        converted.setdefault(f"{name}.weight", torch.eye(width)[:, :, None, None])
        converted.setdefault(f"{name}.bias", torch.zeros(width))
    network = {
        "double_z": True, "z_channels": channels, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": blocks[0],
        "ch_mult": [width // blocks[0] for width in blocks], "num_res_blocks": settings["layers_per_block"],
        "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    vae = comfy.sd.VAE(
        sd=dict(converted), config={"params": {"ddconfig": network, "embed_dim": channels}}, dtype=torch.float32
    )
    vae.latent_channels = channels
    for module in vae.first_stage_model.modules():
        if isinstance(module, torch.nn.GroupNorm):  # core always builds 32 groups: too many for a narrow network
            module.num_groups = settings.get("norm_num_groups", 32)
    _check_names(vae.first_stage_model, converted, path)
    return vae


def _check_names(module: torch.nn.Module, tensors: dict[str, torch.Tensor], path: str) -> None:
    """Core only logs a tensor that is missing or left over; here it is an error."""
    wrong = sorted(module.state_dict().keys() ^ tensors.keys())
    if wrong:
        raise ValueError(f"{path} does not fit its record (tensor {wrong[0]!r}): export it again.")
