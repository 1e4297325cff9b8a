"""Networks of ours under ComfyUI's memory management: loaded when used, moved away when something else needs the room."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from ...kernels import checkpoint
from ...kernels.adapter import AdapterConfig, read_adapter
from ...kernels.edit_decoder import read_edit_decoder
from ...kernels.embedding import SemanticEmbedding, from_hierarchy
from ...kernels.hierarchy import hierarchy
from ...kernels.picture import over_white
from ...kernels.precision import fast_dtype
from ...kernels.vision.known import KNOWN_TOWERS
from ...kernels.vision.towers import load_tower, load_tower_file

# Below this many weights half precision saves nothing worth its rounding.
SMALL = 50_000_000
IMAGES_AT_ONCE = 4


@dataclass(frozen=True, eq=False)
class Network:
    """A module and the patcher that holds it. `name` is the file it came from, `record` what the file says."""

    module: nn.Module
    patcher: Any
    name: str
    record: dict[str, Any]

    def ready(self) -> tuple[torch.device, torch.dtype]:
        """Bring the whole network to the compute device; where and in which dtype it wants its inputs."""
        # Plain torch layers cannot stream their weights, so it is all or nothing.
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        return self.patcher.load_device, next(self.module.parameters()).dtype


def hold(module: nn.Module, path: str, record: dict[str, Any]) -> Network:
    """Put a module under core's ModelPatcher, in the dtype that suits the device and the size of the network."""
    device = comfy.model_management.get_torch_device()
    offload = comfy.model_management.unet_offload_device()
    module = module.to(device=offload, dtype=_dtype(module, device)).eval().requires_grad_(False)
    patcher = comfy.model_patcher.ModelPatcher(module, load_device=device, offload_device=offload)
    return Network(module, patcher, Path(path).name, record)


def load_vision_tower(path: str, model: str | None) -> Network:
    """A vision encoder. `model`: the id of a known public encoder, or None if the file carries our record."""
    if model is None:
        if not checkpoint.has_record(path):
            raise ValueError(
                f"{Path(path).name} does not say which encoder it is: choose its model in the widget below the file."
            )
        tower, record = load_tower_file(path)
    else:
        tower, record = load_tower(KNOWN_TOWERS[model], checkpoint.load_parts(path)), {}
    return hold(tower, path, record)


def load_adapter(path: str) -> Network:
    adapter, record = read_adapter(path)
    return hold(adapter, path, record)


def load_edit_decoder(path: str) -> Network:
    decoder, record = read_edit_decoder(path)
    return hold(decoder, path, record)


@torch.no_grad()
def encode_image(vision: tuple[Network, ...], image: Tensor) -> dict[str, Tensor]:
    """IMAGE [B, H, W, 3 or 4] in 0..1, over white -> tower id -> patch features [B, N, C] float32."""
    pixels = over_white(image).movedim(-1, 1)
    chunks = pixels.split(IMAGES_AT_ONCE)
    progress = comfy.utils.ProgressBar(len(vision) * len(chunks))
    features = {}
    for tower in vision:
        device, _ = tower.ready()
        parts = []
        for chunk in chunks:
            comfy.model_management.throw_exception_if_processing_interrupted()
            parts.append(_give_back(tower.module(chunk.to(device))))
            progress.update(1)
        features[tower.module.config.id] = torch.cat(parts)
    return features


@torch.no_grad()
def build_embedding(adapter: Network, features: dict[str, Tensor], preset: str | None) -> SemanticEmbedding:
    """Patch features -> embedding. `preset`: the active part of the adapter's hierarchy, None for all of it."""
    config = adapter.module.config
    _check_features(adapter.name, config, features)
    active = adapter.module.table if preset is None else hierarchy(preset)
    active.index_in(adapter.module.table)  # refuses before the network is moved
    device, dtype = adapter.ready()
    wanted = {tower.id: features[tower.id].to(device, dtype) for tower in config.towers}
    tokens, pooled = adapter.module(wanted, active)
    widths = adapter.record.get("widths", {})
    source = {"adapter": adapter.name, "preset": preset or "full"}
    if "pooled" in widths:
        source["pooled_width"] = widths["pooled"]
    pooled = None if pooled is None else _give_back(pooled)
    return from_hierarchy(_give_back(tokens), active, pooled, source)


@torch.no_grad()
def edit_embedding(
    decoder: Network, embedding: SemanticEmbedding, clip: Any, instruction: str, mode: str
) -> SemanticEmbedding:
    """The embedding after an instruction that is read by the model's own text encoder."""
    check_instruction(instruction)
    decoder.module.check_mode(mode)
    config = decoder.module.config
    if embedding.width != config.dim:
        raise ValueError(
            f"{decoder.name} edits embeddings of width {config.dim} and this one has {embedding.width}: "
            "use the edit decoder that belongs to the adapter."
        )
    if "adapter" not in embedding.source:
        raise ValueError(
            f"{decoder.name} edits what one adapter makes, and this embedding does not come from one adapter alone: "
            "encode an image with Build Hierarchical Embedding and edit that."
        )
    text = clip.encode_from_tokens(clip.tokenize(instruction))
    if text.shape[-1] != config.text_dim:
        raise ValueError(
            f"This CLIP gives text of width {text.shape[-1]} and {decoder.name} reads {config.text_dim}: "
            "connect the CLIP of the Flux model (its T5)."
        )
    device, dtype = decoder.ready()
    steps = embedding.token_count if mode == "autoregressive" else 1
    progress = comfy.utils.ProgressBar(steps)
    tokens = decoder.module.generate(
        embedding.tokens.to(device, dtype),
        embedding.boxes,
        embedding.levels,
        text.to(device, dtype).expand(embedding.batch, -1, -1),
        mode=mode,
        progress=lambda done, total: _report(progress, done, total),
    )
    edits = [*embedding.source.get("edits", ()), instruction]
    return replace(embedding, tokens=_give_back(tokens), source={**embedding.source, "edits": edits})


def check_instruction(text: str) -> None:
    if not text.strip():
        raise ValueError("The instruction is empty: write what to change, for example `remove the red circle`.")


def _report(progress, done: int, total: int) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()
    progress.update_absolute(done, total)


def _give_back(tensor: Tensor) -> Tensor:
    return tensor.to(comfy.model_management.intermediate_device(), torch.float32)


def _dtype(module: nn.Module, device: torch.device) -> torch.dtype:
    """float32 for a small network, otherwise what the device computes fast, where core's flags and its list of cards agree."""
    weights, fast = sum(parameter.numel() for parameter in module.parameters()), fast_dtype(device)
    if weights < SMALL or fast is torch.float32:
        return torch.float32
    core = comfy.model_management
    if core.is_device_cpu(device):  # of which core always says no
        return torch.float32 if core.FORCE_FP32 else fast
    if fast is torch.bfloat16 and core.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if core.should_use_fp16(device) else torch.float32


def _check_features(name: str, config: AdapterConfig, features: dict[str, Tensor]) -> None:
    for tower in config.towers:
        if tower.id not in features:
            raise ValueError(
                f"{name} was trained with the vision encoder {tower.id!r} and the features come from "
                f"{', '.join(map(repr, features))}: load {tower.id!r} in Load Vision Encoders."
            )
        rows, cols = tower.grid
        if features[tower.id].shape[1:] != (rows * cols, tower.width):
            raise ValueError(
                f"{name} expects {rows}x{cols} patches of width {tower.width} from {tower.id!r} and got "
                f"{list(features[tower.id].shape[1:])}: load the very file that it was trained with."
            )
