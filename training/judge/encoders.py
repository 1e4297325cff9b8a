"""The encoders of judging: CLIP and DINO from local files, each with its own resize and normalisation. No download.

Three kinds of places are read: a folder as transformers saves one (config.json, model.safetensors,
preprocessor_config.json, and a tokenizer for a text half), a folder as open_clip publishes one (open_clip_config.json,
open_clip_model.safetensors), and a vision tower's file of this pack.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...kernels.vision.towers import load_tower_file
from ..files import file_hash

BATCH = 16
SHORT, LONG = 224, 480  # px: the sides to which Splice resizes a picture before it compares structures
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """Pictures [H, W, 3] uint8 of one size -> [N, 3, H, W] float32 in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 1).float() / 255


def to_pixels(pictures: Tensor) -> np.ndarray:
    """[..., 3, H, W] float in [0, 1] -> [..., H, W, 3] uint8."""
    return (pictures * 255).round().byte().movedim(-3, -1).cpu().numpy()


class Encoder(nn.Module):
    """A frozen encoder. `weights` is its file. `reads` says whether it has a text half."""

    reads = False

    def __init__(self, model: nn.Module, weights: Path, device: torch.device):
        super().__init__()
        self.model, self.weights = model.to(device).eval().requires_grad_(False), weights
        self.device = device

    def describe(self) -> dict:
        """The protocol's entry for it."""
        return {"kind": type(self.model).__name__, "file": str(self.weights), "sha256": file_hash(self.weights)}

    @torch.no_grad()
    def images(self, pictures: list[np.ndarray]) -> Tensor:
        """Pictures [H, W, 3] uint8 of any sizes -> features [N, D] float32 of unit length, on the CPU."""
        parts = [self._images(pictures[i:i + BATCH]).float().cpu() for i in range(0, len(pictures), BATCH)]
        return F.normalize(torch.cat(parts), dim=-1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """[N, D] float32 of unit length, in the space of the pictures' features."""
        parts = [self._texts(texts[i:i + BATCH]).float().cpu() for i in range(0, len(texts), BATCH)]
        return F.normalize(torch.cat(parts), dim=-1)

    @torch.no_grad()
    def keys(self, picture: np.ndarray) -> Tensor:
        """The last layer's keys [1, N, D] of a picture's tokens, all heads together. ValueError where there are
        none."""
        names = [name for name, _ in self.model.named_modules() if name.endswith((".k_proj", ".attention.key"))]
        if not names or self.reads:
            raise ValueError(f"{self.weights} is no DINO, whose keys the structure distance reads: "
                             "give the folder of dino-vitb8.")
        caught = []
        handle = self.model.get_submodule(names[-1]).register_forward_hook(
            lambda module, args, output: caught.append(output))
        try:
            self._whole(picture)
        finally:
            handle.remove()
        return caught[0].float().cpu()

    def _images(self, pictures: list[np.ndarray]) -> Tensor:
        raise NotImplementedError

    def _texts(self, texts: list[str]) -> Tensor:
        raise NotImplementedError

    def _whole(self, picture: np.ndarray) -> None:
        """Encode a picture and keep its aspect where the network allows it."""
        self._images([picture])


class TowerEncoder(Encoder):
    """A vision tower of this pack: CLIP's projected image feature, DINOv2's class token."""

    def __init__(self, path: Path, device: torch.device):
        tower = load_tower_file(path)[0].float()
        super().__init__(tower.model, path, device)
        self.tower = tower

    def describe(self) -> dict:
        return super().describe() | {"kind": self.tower.config.id}

    def _images(self, pictures: list[np.ndarray]) -> Tensor:
        pixels = torch.cat([self.tower.preprocess(to_tensor([picture]).to(self.device)) for picture in pictures])
        if self.tower.config.kind == "open_clip":
            return self.model(pixels)
        return self.model(pixels).last_hidden_state[:, 0]


class TransformersEncoder(Encoder):
    """CLIP, SigLIP or a DINO of transformers, with the folder's own image processor."""

    def __init__(self, folder: Path, device: torch.device):
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        here = {"local_files_only": True}
        super().__init__(AutoModel.from_pretrained(folder, use_safetensors=True, **here), folder / "model.safetensors",
                         device)
        self.processor = AutoImageProcessor.from_pretrained(folder, **here)
        self.reads = hasattr(self.model, "get_text_features")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **here) if self.reads else None

    def _images(self, pictures: list[np.ndarray]) -> Tensor:
        images = [Image.fromarray(picture) for picture in pictures]
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.device)
        if self.reads:
            return _pooled(self.model.get_image_features(pixel_values=pixels))
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]

    def _texts(self, texts: list[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return _pooled(self.model.get_text_features(**words.to(self.device)))

    def _whole(self, picture: np.ndarray) -> None:
        """Splice's preprocessing: the short side to 224 px, the long one at most 480, ImageNet's normalisation."""
        height, width = picture.shape[:2]
        scale = min(SHORT / min(height, width), LONG / max(height, width))
        size = (round(height * scale), round(width * scale))
        pixels = F.interpolate(to_tensor([picture]), size, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
        # DINOv2's classes always interpolate their position table and do not take this argument.
        extra = {} if self.model.config.model_type.startswith("dinov2") else {"interpolate_pos_encoding": True}
        self.model(pixel_values=((pixels - mean) / std).to(self.device), **extra)


class OpenClipEncoder(Encoder):
    """A complete CLIP of open_clip from a folder in its published layout."""

    reads = True

    def __init__(self, folder: Path, device: torch.device):
        import open_clip

        name = f"local-dir:{folder}"
        model, self.preprocess = open_clip.create_model_from_pretrained(name)
        super().__init__(model, folder / "open_clip_model.safetensors", device)
        self.tokenizer = open_clip.get_tokenizer(name)

    def _images(self, pictures: list[np.ndarray]) -> Tensor:
        return self.model.encode_image(torch.stack([self.preprocess(Image.fromarray(p)) for p in pictures]).to(self.device))

    def _texts(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(self.device))


def _pooled(features) -> Tensor:
    """The features of transformers 5, which wraps them, or of transformers 4, which does not."""
    return features if isinstance(features, Tensor) else features.pooler_output


def load_encoder(path: Path, device: torch.device) -> Encoder:
    """The encoder of a folder or a file. ValueError in one sentence where there is none or its weights are not
    safetensors."""
    if path.is_file():
        return TowerEncoder(path, device)
    for mark, weights, kind in (("open_clip_config.json", "open_clip_model.safetensors", OpenClipEncoder),
                                ("config.json", "model.safetensors", TransformersEncoder)):
        if (path / mark).is_file():
            if not (path / weights).is_file():
                raise ValueError(f"{path} has no {weights}: download the model's safetensors, other weights are "
                                 "not read.")
            try:
                return kind(path, device)
            except (OSError, KeyError, RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"The encoder in {path} cannot be read ({reason}): download its "
                                 "folder again.") from error
    raise ValueError(f"There is no encoder at {path}: give a folder with config.json or open_clip_config.json, "
                     "or a tower's file.")
