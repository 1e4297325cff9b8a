"""Vision towers: one public image encoder each, from pixels to one feature vector per patch.

The networks are the real classes of open_clip and transformers, built from an architecture dict without any network
access; this file adds what those libraries leave to the caller: the encoder's own resize and normalisation, the
choice of layer, and the removal of the class and register tokens.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint, schema
from .architectures import KINDS, check_architecture
from .layouts import library_layout


@dataclass(frozen=True)
class TowerConfig:
    """Everything needed to rebuild one tower; `to_json` is what checkpoints carry.

    id            name by which adapters and files refer to the tower
    kind          "open_clip" (CLIP and SigLIP models), "dinov2" (with or without registers) or "internvit"
    architecture  open_clip: {"embed_dim", "quick_gelu", "vision_cfg"} as in open_clip's model configs;
                  dinov2, internvit: keyword arguments of transformers' Dinov2Config (Dinov2WithRegistersConfig where
                  "num_register_tokens" is given) and InternVLVisionConfig
    image_size    side in pixels to which images are resized; the network's own size may differ where it interpolates
                  its position table (DINOv2)
    patch, width  side of a patch in pixels; channels per patch feature
    mean, std     of the normalisation, per RGB channel, for pixels in [0, 1]
    layer         -1: the last layer after its final norm; -2: the one before, unnormed, and so on
    resize        "squash": both sides to image_size whatever the aspect, so that unit coordinates stay unit coordinates
    """

    __pydantic_config__ = schema.CLOSED

    id: schema.Name
    kind: str
    architecture: dict[str, Any]
    image_size: schema.Side
    patch: schema.Patch
    width: schema.Width
    mean: tuple[schema.Number, schema.Number, schema.Number]
    std: tuple[schema.Positive, schema.Positive, schema.Positive]
    layer: schema.whole(-256, -1) = -1
    resize: str = "squash"

    def __post_init__(self):
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if self.kind not in KINDS:
            raise ValueError(f"Vision tower '{self.id}' is of unknown kind '{self.kind}'; use one of {', '.join(KINDS)}.")
        if self.resize != "squash":
            raise ValueError(f"Vision tower '{self.id}' asks for resize '{self.resize}'; only 'squash' is known.")
        if self.image_size % self.patch:
            raise ValueError(
                f"Vision tower '{self.id}' has an input of {self.image_size} px, which is no multiple of its {self.patch} px "
                f"patches; use {self.image_size // self.patch * self.patch} px."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the patch features."""
        return (self.image_size // self.patch,) * 2

    def check_architecture(self) -> None:
        """ValueError where the architecture says anything that describes none (`architectures`)."""
        check_architecture(self.kind, self.architecture, f"The architecture of vision tower {schema.short(self.id)}")

    def to_json(self) -> dict:
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, record: dict) -> TowerConfig:
        config = schema.parse(cls, record, "The vision tower record")
        config.check_architecture()
        return config


class VisionTower(nn.Module):
    """A frozen-by-convention encoder; `model` is the library's own network and keeps the library's own key layout."""

    def __init__(self, config: TowerConfig):
        """ValueError for an architecture that cannot be built, or says more than an architecture (`architectures`)."""
        super().__init__()
        self.config = config
        config.check_architecture()
        try:
            self.model = _BUILDERS[config.kind](config)
        except Exception as error:  # each library complains in its own way about numbers that do not go together
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(f"The vision tower {schema.short(config.id)} cannot be built ({reason}).") from error

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the patch features."""
        return self.config.grid

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, first to last: what a training stage unlocks from the end."""
        if self.config.kind != "open_clip":
            return self.model.encoder.layer
        return self.model.trunk.blocks if hasattr(self.model, "trunk") else self.model.transformer.resblocks

    def preprocess(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1], any size -> [B, 3, S, S] float32, resized as the encoder was trained and normalised.

        Bicubic with antialiasing; clamped, because the encoders were trained on 8-bit pixels that cannot overshoot.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"A vision tower takes RGB images [B, 3, H, W], but got {list(images.shape)}; drop the alpha channel.")
        size = self.grid[0] * self.config.patch
        images = images.float()
        if images.shape[-2:] != (size, size):
            device = images.device
            if device.type == "mps":  # antialiasing came to MPS late
                images = images.cpu()
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1).to(device)
        mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (self.config.mean, self.config.std))
        return (images - mean) / std

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1], any size -> patch features [B, rows * cols, width], in the weights' dtype."""
        pixels = self.preprocess(images).to(next(self.model.parameters()).dtype)
        layer = self.config.layer
        if self.config.kind == "open_clip":
            depth = len(self.blocks)
            output = self.model.forward_intermediates(
                pixels,
                indices=[depth + layer],
                stop_early=True,
                normalize_intermediates=layer == -1,
                intermediates_only=True,
                output_fmt="NLC",
            )
            return output["image_intermediates"][0]
        if layer == -1:
            features = self.model(pixels).last_hidden_state
        else:
            features = self._input_of_block(layer + 1, pixels)
        return features[:, features.shape[1] - self.grid[0] * self.grid[1] :]

    def before(self, images: Tensor, last: int) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> the hidden state [B, tokens, width] that enters the last `last` blocks of a DINOv2:
        all that can be kept while those blocks learn. Raises ValueError for other towers."""
        if self.config.kind != "dinov2" or self.config.layer != -1 or not 0 < last <= len(self.blocks):
            raise ValueError(f"The hidden state of vision tower '{self.config.id}' before its last {last} blocks cannot be kept; that "
                             f"is possible for a DINOv2 that is read after its last layer, with 1 to {len(self.blocks)} blocks.")
        pixels = self.preprocess(images).to(next(self.model.parameters()).dtype)
        return self._input_of_block(len(self.blocks) - last, pixels)

    def after(self, hidden: Tensor, last: int) -> Tensor:
        """What `forward` gives, from what `before` gave."""
        for block in self.blocks[len(self.blocks) - last:]:
            hidden = block(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # in older releases of transformers
        return self.model.layernorm(hidden)[:, hidden.shape[1] - self.grid[0] * self.grid[1]:]

    def _input_of_block(self, index: int, pixels: Tensor) -> Tensor:
        # Not by `output_hidden_states`: InternVL's model takes that argument in some releases of transformers only.
        caught = []
        handle = self.blocks[index].register_forward_pre_hook(lambda module, args: caught.append(args[0]))
        try:
            self.model(pixels)
        finally:
            handle.remove()
        return caught[0]


def _open_clip(config: TowerConfig) -> nn.Module:
    import open_clip

    # open_clip has no public constructor for the image half alone: build a CLIP with the smallest text half, keep
    # `visual`.
    text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
    visual = open_clip.CLIP(text_cfg=text, **config.architecture).visual
    if not hasattr(visual, "forward_intermediates"):
        raise ValueError(f"open_clip {open_clip.__version__} is too old for this pack: update open_clip_torch")
    return visual


def _dinov2(config: TowerConfig) -> nn.Module:
    import transformers

    if "num_register_tokens" in config.architecture:
        return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**config.architecture))
    return transformers.Dinov2Model(transformers.Dinov2Config(**config.architecture))


def _internvit(config: TowerConfig) -> nn.Module:
    import transformers

    if not hasattr(transformers, "InternVLVisionModel"):
        raise ValueError(f"transformers {transformers.__version__} has no InternViT: update transformers, or use another encoder")
    # Mean pooling only drops a final norm that InternViT's published files do not have.
    return transformers.InternVLVisionModel(transformers.InternVLVisionConfig(use_mean_pooling=True, **config.architecture))


def _check_forward(tower: VisionTower) -> None:
    """ValueError unless the tower gives the patches that its configuration promises. On the meta device it is free."""
    config, found = tower.config, None
    # Of transformers' networks the last tokens are taken for the patches, however many there are.
    patch = config.architecture["patch_size"] if config.kind != "open_clip" else config.patch
    if len(tower.blocks) + config.layer >= 0 and patch in (config.patch, [config.patch] * 2):
        try:
            found = tuple(tower(torch.empty(1, 3, config.image_size, config.image_size)).shape)
        except (RuntimeError, ValueError, AssertionError, IndexError):
            pass
    rows, cols = config.grid
    if found != (1, rows * cols, config.width):
        raise ValueError(
            f"The vision tower {schema.short(config.id)} does not give {rows}x{cols} patches of width {config.width} at layer "
            f"{config.layer}, as its record says: export the file again."
        )


# What a network's weights are stored in; anything else is a damaged file, or one of a quantised network.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BUILDERS = {"open_clip": _open_clip, "dinov2": _dinov2, "internvit": _internvit}


def build_tower(config: TowerConfig) -> VisionTower:
    """A tower with random weights, in eval mode."""
    return VisionTower(config).eval()


def load_tower_file(path: str | os.PathLike) -> tuple[VisionTower, dict[str, Any]]:
    """(tower in eval mode, record) of a file of our own.

    ValueError in one sentence where there is none or it does not fit.
    """
    tensors, record = checkpoint.load(path, "vision_tower")
    return load_tower(TowerConfig.from_json(record["config"]), tensors), record


def load_tower(config: TowerConfig, state_dict: dict[str, Tensor]) -> VisionTower:
    """A tower with the weights of a file, in eval mode and in the file's dtype (the widest where it mixes them, as
    8-bit files do once dequantised).

    state_dict: our own files or a public file of the same encoder: open_clip's keys (`visual.*` of a whole CLIP, or
    its image half alone), transformers' keys (with or without a task model's prefix), or OpenGVLab's own InternViT
    keys. Other keys of a whole model are ignored. Tensors of the right dtype are used without a copy.
    Raises ValueError where the file does not fit the tower.
    """
    with torch.device("meta"):  # no time for random weights that the next line throws away
        tower = VisionTower(config)
    wanted = tower.model.state_dict()
    state_dict = library_layout(config.kind, state_dict, wanted)
    wrong = [f"lacks '{name}'" for name in wanted if name not in state_dict]
    wrong += [f"has an unknown {schema.short(name)}" for name in state_dict if name not in wanted]
    wrong += [
        f"has {name!r} as {tensor.dtype}" for name, tensor in state_dict.items() if tensor.dtype not in _FLOATS and name in wanted
    ]
    wrong += [
        f"has '{name}' of shape {list(tensor.shape)} instead of {list(wanted[name].shape)}"
        for name, tensor in state_dict.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more differences" if len(wrong) > 1 else ""
        raise ValueError(
            f"This file is not the vision tower {schema.short(config.id)}: it {wrong[0]}{more}; choose the matching file or "
            "another tower id."
        )
    with torch.device("meta"):
        _check_forward(tower)
    tower.model.load_state_dict(state_dict, assign=True)
    return tower.to(reduce(torch.promote_types, {parameter.dtype for parameter in tower.parameters()})).eval()
