"""The encoders of pictures: the vision towers and Flux's VAE, from files, offline and frozen."""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ...kernels import checkpoint
from ...kernels.adapter import AdapterConfig
from ...kernels.precision import frozen_dtype
from ...kernels.vision.known import KNOWN_TOWERS
from ...kernels.vision.towers import TowerConfig, VisionTower, load_tower
from ..files import folder_tensors, outline, recorded
from .base import base_sha256

FLUX_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159}  # black-forest-labs/flux, util.py


class Latents:
    """The frozen VAE with the scale and the shift between its latents and Flux's: flux = scale * (vae - shift).

    channels, downsample: of the latents (16 and 8 for FLUX.1).
    """

    def __init__(self, vae: AutoencoderKL):
        self.vae = vae
        # one picture at a time: the convolutions of a batch of large ones would need most of the memory
        vae.enable_slicing()
        self.scale, self.shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        self.channels, self.downsample = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [0, 1] -> (mean, deviation) of their latents as Flux takes them, float32 [B, C, h,
        w]."""
        with torch.autocast(images.device.type, enabled=False):
            posterior = self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent_dist
        return (posterior.mean.float() - self.shift) * self.scale, posterior.std.float() * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents as Flux makes them -> images [B, 3, H, W] float32 in [0, 1]."""
        with torch.autocast(latents.device.type, enabled=False):
            images = self.vae.decode((latents / self.scale + self.shift).to(self.vae.dtype)).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)


def load_vae(path: Path, device: torch.device) -> Latents:
    """Flux's VAE from `ae.safetensors`, from a diffusers folder (`vae/` or its parent), or from one of our files.

    Its dtype is that of `frozen_dtype`. Raises ValueError where the file is not a VAE.
    """
    vae, tensors = vae_of(Path(path), checkpoint.load_tensors)
    dtype = frozen_dtype(device)
    vae.load_state_dict({k: v.to(device, dtype) for k, v in tensors.items()}, assign=True)
    return Latents(vae.to(memory_format=torch.channels_last).eval().requires_grad_(False))


def vae_of(path: Path, read: Callable[[Path], dict[str, Tensor]]) -> tuple[AutoencoderKL, dict[str, Tensor]]:
    """(the VAE of a file without weights, on the meta device; its tensors by diffusers' names). The two fit one
    another. read: as in `base.skeleton`."""
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        if not (folder / "config.json").is_file():
            raise ValueError(f"{path} has no vae/config.json; give the diffusers folder of FLUX.1-dev, or "
                             "ae.safetensors.")
        config, tensors = json.loads((folder / "config.json").read_text(encoding="utf-8")), folder_tensors(folder, read)
        if config.get("_class_name") != "AutoencoderKL":
            raise ValueError(f"{path} holds a {config.get('_class_name')}, not Flux's AutoencoderKL; give the VAE of "
                             "FLUX.1-dev.")
    elif checkpoint.has_record(path):
        tensors, record = recorded(path, "vae", read)
        config = {"scaling_factor": 1.0, "shift_factor": 0.0, **record["config"]}
    else:
        config, tensors = from_single_file(path, read)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    try:
        vae.load_state_dict({k: v.to("meta") for k, v in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the VAE it says it is ({str(error).splitlines()[1].strip()}); download "
                         "it again.") from None
    return vae, tensors


def from_single_file(path: Path, read: Callable[[Path], dict[str, Tensor]]) -> tuple[dict, dict[str, Tensor]]:
    """(config, diffusers' state dict) of a VAE in BFL's layout; the widths are read from its tensors."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    tensors = read(path)
    levels = len({k.split(".")[2] for k in tensors if k.startswith("encoder.down.")})
    if not levels or "decoder.conv_in.weight" not in tensors:
        raise ValueError(f"{path} is no VAE in the layout of ae.safetensors; give ae.safetensors of FLUX.1-dev.")
    config = {"in_channels": 3, "out_channels": 3, "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
              "block_out_channels": [tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)],
              "layers_per_block": len({k.split(".")[4] for k in tensors if k.startswith("encoder.down.0.block.")}),
              "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
              "use_quant_conv": "quant_conv.weight" in tensors,
              "use_post_quant_conv": "post_quant_conv.weight" in tensors,
              "norm_num_groups": 32, **FLUX_VAE}
    return config, convert_ldm_vae_checkpoint(tensors, config)


def load_towers(files: tuple[Path, ...], ids: tuple[str, ...], device: torch.device,
                dtype: torch.dtype) -> dict[str, VisionTower]:
    """Frozen vision towers by their ids, in the order of the files.

    ids: for each file the id of a published encoder (kernels/vision/known.py), "" where the file's record has it. ids
    may be left out where every file has it. A file may also be a folder with the published safetensors weights.
    """
    towers = [load_one(path, name) for path, name in with_ids(files, ids)]
    found = {tower.config.id: tower.to(device, dtype).requires_grad_(False) for tower in towers}
    if len(found) < len(towers):
        raise ValueError("The same vision tower is listed twice; list every tower once.")
    return found


def with_ids(files: Sequence[Path], ids: Sequence[str]) -> list[tuple[Path, str]]:
    """Every file of a vision tower with its id; "" for all of them where no ids are given."""
    if ids and len(ids) != len(files):
        raise ValueError(f"Vision towers and ids do not pair up ({len(files)} and {len(ids)}); give one id for each, "
                         "\"\" for our own.")
    return list(zip(map(Path, files), ids or [""] * len(files)))


def tower_config(path: Path, name: str) -> TowerConfig:
    """The encoder of a file: the published one of this id or, for "", the one in the file's own record."""
    if name:
        if name not in KNOWN_TOWERS:
            raise ValueError(f"There is no vision tower '{name}'; the known ones are {', '.join(KNOWN_TOWERS)}.")
        return KNOWN_TOWERS[name]
    if path.is_dir() or not checkpoint.has_record(path):
        raise ValueError(f"{path} does not say which encoder it is; name it in vision.ids ({', '.join(KNOWN_TOWERS)}).")
    return TowerConfig.from_json(checkpoint.read_header(path, "vision_tower")["config"])


def load_one(path: Path, name: str) -> VisionTower:
    config = tower_config(path, name)
    if path.is_dir():
        return load_tower(config, folder_tensors(path))
    return load_tower(config, checkpoint.load_tensors(path) if name else checkpoint.load(path, "vision_tower")[0])


def check_tower(path: Path, name: str) -> TowerConfig:
    """The encoder of a file. ValueError where the file does not fit the id. Its weights are not read."""
    config = tower_config(path, name)
    if path.is_dir():
        load_tower(config, folder_tensors(path, outline))
    else:
        load_tower(config, outline(path) if name else recorded(path, "vision_tower", outline)[0])
    return config


def check_towers(towers: Sequence[tuple[Path, str]], adapter: Path, record: dict) -> None:
    """Refuse towers that an adapter was not trained with. ValueError where one is missing or its DINOv2 is a different
    one.

    towers: files with their ids, as `with_ids` pairs them. record: of the adapter's file.
    """
    configs = [tower_config(path, name) for path, name in towers]
    given = [config.id for config in configs]
    for wanted in AdapterConfig.from_json(record["config"]).towers:
        if wanted.id not in given:
            raise ValueError(f"{adapter} looks through '{wanted.id}', which is not among the towers ({', '.join(given)}); "
                             "give its file as well.")
    for (path, _), config in zip(towers, configs):
        if config.kind == "dinov2" and not tuned_together(path, config.id, record):
            raise ValueError(f"{path} is not the '{config.id}' that was tuned with {adapter}; give the one "
                             "exported with it.")


def tuned_together(path: Path, name: str, record: dict) -> bool:
    """Whether the file of the tower `name` is the one that an adapter's record asks for. The record asks for none where
    training left the tower as published."""
    if "dinov2_sha256" in record:
        return base_sha256(path) == record["dinov2_sha256"]
    if not record.get("towers", {}).get(name, "").startswith("tuned"):
        return True
    own = checkpoint.read_header(path) if path.is_file() and checkpoint.has_record(path) else {}
    return all(own.get(key) == record[key] for key in ("run", "step"))
