"""The frozen base: FLUX.1 from one file or a diffusers folder, at any width, offline, in bf16, fp32, int8 or NF4.

Its shape is read from the file. The tensors are mapped into memory and moved to the device one by one, so a quantised
base needs room for itself and one layer, not for the whole base in bf16.
"""
from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from ...kernels import checkpoint, schema
from ...kernels.precision import resolve
from ..files import file_hash, folder_tensors, recorded
from .flux import build_flux, from_bfl, to_bfl
from .fp8 import unscaled

Precision = Literal["auto", "bf16", "fp32", "int8", "nf4"]
LIBRARY = {"int8": "torchao", "nf4": "bitsandbytes"}
AXES = {128: [16, 56, 56]}  # width of a head -> channels of each axis of the rotary positions, as in every FLUX.1
PREFIX = "model.diffusion_model."
# Tensors of other models, which FLUX.1 does not have: (part of a tensor's name, what the file is)
OTHERS = (("lora", "a LoRA"), ("double_stream_modulation_img", "FLUX.2"), ("joint_blocks.", "Stable Diffusion 3"),
          ("distilled_guidance_layer", "Chroma"), ("input_blocks.", "a Stable Diffusion U-Net"),
          ("single_transformer_blocks.", "a part of a diffusers folder (give the folder itself)"))
CLASSES = {"Flux2Transformer2DModel": "FLUX.2", "SD3Transformer2DModel": "Stable Diffusion 3",
           "UNet2DConditionModel": "a Stable Diffusion U-Net", "ChromaTransformer2DModel": "Chroma"}


def refuse(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is {what}, not FLUX.1; give flux1-dev.safetensors, or the diffusers folder of "
                      "FLUX.1-dev.")


def config_of(path: Path, state: dict[str, Tensor]) -> dict:
    """The shape of a Flux in BFL's layout, in ComfyUI's field names, from its tensors. ValueError for other models."""
    if "img_in.weight" not in state or "txt_in.weight" not in state or "double_blocks.0.img_attn.norm.query_norm.scale" not in state:
        raise refuse(path, next((what for part, what in OTHERS if any(part in k for k in state)), "another model"))
    if any("distilled_guidance_layer" in k or "lora" in k for k in state):
        raise refuse(path, next(what for part, what in OTHERS if any(part in k for k in state)))
    hidden, channels = state["img_in.weight"].shape
    head = len(state["double_blocks.0.img_attn.norm.query_norm.scale"])
    if channels != state["final_layer.linear.weight"].shape[0]:
        raise ValueError(f"{path} takes a picture beside the noise ({channels} channels; a Fill, Canny or "
                         f"Depth model); the adapter trains through a text-to-image FLUX.1, such as FLUX.1-dev.")
    if head not in AXES:
        raise ValueError(f"{path} has heads of width {head} and says nothing of its rotary axes; FLUX.1 has heads of "
                         "width 128.")
    return dict(hidden_size=hidden, num_heads=hidden // head, depth=count(state, "double_blocks"),
                depth_single_blocks=count(state, "single_blocks"), axes_dim=AXES[head],
                context_in_dim=state["txt_in.weight"].shape[1], vec_in_dim=state["vector_in.in_layer.weight"].shape[1],
                in_channels=channels // 4, patch_size=2, guidance_embed="guidance_in.in_layer.weight" in state)


def count(state: dict[str, Tensor], stack: str) -> int:
    return len({k.split(".")[1] for k in state if k.startswith(f"{stack}.")})


def skeleton(path: Path, read: Callable[[Path], dict[str, Tensor]] = checkpoint.load_tensors
             ) -> tuple[FluxTransformer2DModel, dict[str, Tensor]]:
    """(Flux without weights, on the meta device; its tensors as they are stored, by diffusers' names).

    read: `load_tensors`, or `outline` where only the file's header is wanted. Raises ValueError in one sentence for
    everything that is not a whole FLUX.1, an unknown tensor included.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        raise ValueError(f"{path} is a GGUF file, which diffusers cannot train through; "
                         "give the safetensors file, with --base.precision nf4.")
    flux, state = from_folder(path, read) if path.is_dir() else from_file(path, read)
    wanted = flux.state_dict()
    wrong = [f"lacks {k}" for k in wanted if k not in state] + [f"has an unknown {k}" for k in state if k not in wanted]
    wrong += [f"has {k} of shape {list(v.shape)} instead of {list(wanted[k].shape)}" for k, v in state.items()
              if k in wanted and v.shape != wanted[k].shape]
    wrong += [f"has {k} in {v.dtype}, which is no float" for k, v in state.items() if not v.dtype.is_floating_point]
    if wrong:
        more = f", and {len(wrong) - 1} more" if wrong[1:] else ""
        raise ValueError(f"{path} is no whole FLUX.1: it {wrong[0]}{more}; download it again.")
    return flux, state


def from_file(path: Path,
              read: Callable[[Path], dict[str, Tensor]]) -> tuple[FluxTransformer2DModel, dict[str, Tensor]]:
    if checkpoint.has_record(path):
        tensors, record = recorded(path, "flux", read)
        config = record["config"]
    else:
        tensors = read(path)
        # a whole checkpoint also has the VAE and the text encoders
        if any(k.startswith(PREFIX) for k in tensors):
            tensors = {k[len(PREFIX):]: v for k, v in tensors.items() if k.startswith(PREFIX)}
        tensors = unscaled(path, tensors, PREFIX)
        config = config_of(path, tensors)
    with torch.device("meta"):
        flux = build_flux(config)
    if "sampling_shift_mu" in config:
        flux.register_to_config(sampling_shift_mu=config["sampling_shift_mu"])
    unknown = sorted(tensors.keys() - to_bfl(flux.state_dict()).keys())
    if unknown:
        raise ValueError(f"{path} has {schema.short(unknown[0])}{f' and {len(unknown) - 1} more' if unknown[1:] else ''}, which FLUX.1 "
                         "has not: it is of another model or quantised in a way that is not read here; give the bf16, "
                         "fp16 or fp8 file.")
    try:
        return flux, from_bfl(tensors, config["hidden_size"])
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}: it is cut or of another model; download it again.") from None


def from_folder(path: Path,
                read: Callable[[Path], dict[str, Tensor]]) -> tuple[FluxTransformer2DModel, dict[str, Tensor]]:
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if not (folder / "config.json").is_file():
        raise ValueError(f"{path} has no transformer/config.json: give the diffusers folder of FLUX.1-dev, or its "
                         "single file.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("_class_name")
    if kind != "FluxTransformer2DModel":
        raise refuse(path, CLASSES.get(kind, f"a {kind}"))
    if "quantization_config" in config:
        raise ValueError(f"{path} is quantised already; give the bf16 weights, they are quantised by --base.precision.")
    with torch.device("meta"):
        flux = FluxTransformer2DModel.from_config(config)
    return flux, folder_tensors(folder, read)


def load_flux(path: Path, precision: Precision = "auto", device: torch.device | str = "cpu") -> FluxTransformer2DModel:
    """A frozen Flux in eval mode. Raises ValueError in one sentence for everything that is not FLUX.1.

    path: a single file in BFL's layout (fp32, bf16, fp16, or fp8 with or without scales; bare, in a ComfyUI checkpoint,
        or one of ours), or a diffusers folder (`transformer/` or its parent).
    precision: of the weights; auto: bf16 where the device computes it fast, fp32 elsewhere. int8 (torchao, one scale
        per row) and nf4 (bitsandbytes; QLoRA, arXiv 2305.14314) are for the linear layers of the blocks; the norms, the
        embedders and the last projection stay in what `auto` says, which is also what the quantised layers compute in.
        `.config.sampling_shift_mu` is there only where the file names the base's own time shift (the miniature's does).
        """
    check_precision(precision)
    flux, state = skeleton(path)
    return filled(flux, precision, device, lambda name, leaf, dtype: state.pop(f"{name}.{leaf}").to(device, dtype))


def filled(flux: FluxTransformer2DModel, precision: Precision, device: torch.device | str,
           tensor: Callable[[str, str, torch.dtype], Tensor]) -> FluxTransformer2DModel:
    """A frozen Flux, filled from the meta device by `tensor(name, leaf, dtype)` for every parameter, layer by layer.
    Each layer is quantised before the next one is read. device: where it computes."""
    plain = resolve("auto" if precision in LIBRARY else precision, device)
    dtype = torch.bfloat16 if plain == "bf16" else torch.float32
    for name, module in list(flux.named_modules()):
        for leaf, _ in list(module.named_parameters(recurse=False)):
            module.register_parameter(leaf, nn.Parameter(tensor(name, leaf, dtype), requires_grad=False))
        if isinstance(module, nn.Linear) and is_quantised(name):
            quantise(flux, name, module, precision, dtype)
    return flux.eval().requires_grad_(False)


def check_precision(precision: Precision) -> None:
    """Raise ValueError where the library for a quantised precision is not installed."""
    library = LIBRARY.get(precision)
    if library and importlib.util.find_spec(library) is None:
        raise ValueError(f"A base in {precision} needs {library}; install it (pip install {library}), or take "
                         "--base.precision bf16.")


def is_quantised(name: str) -> bool:
    """Whether a linear layer of this name is quantised: those of the blocks are."""
    return name.startswith(("transformer_blocks.", "single_transformer_blocks."))


def quantise(flux: nn.Module, name: str, layer: nn.Linear, precision: Precision, dtype: torch.dtype) -> None:
    if precision == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(layer, Int8WeightOnlyConfig(), filter_fn=lambda module, _: module is layer)
    elif precision == "nf4":
        import bitsandbytes

        device, weight = layer.weight.device, layer.weight.data
        made = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, device="meta",
                                          compute_dtype=dtype, quant_type="nf4")
        made.weight = bitsandbytes.nn.Params4bit(weight.contiguous(), requires_grad=False, quant_type="nf4")
        made.bias = layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(flux.get_submodule(parent), leaf, made.to(device))


def base_sha256(path: Path, part: str = "transformer") -> str:
    """sha256 of a single file, or of the names and hashes of a model folder's configuration and weights. Where the
    folder is a whole pipeline, only its `part` counts."""
    path = Path(path)
    if path.is_file():
        return file_hash(path)
    folder = path / part if (path / part).is_dir() else path
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "config.json")
    return hashlib.sha256("".join(f"{p.name} {file_hash(p)}\n" for p in files).encode()).hexdigest()
