"""The space that an edit decoder learns to write in: a frozen adapter's, or that of embeddings fitted without one.

Either says its `hierarchy` (as a decoder's configuration has it), its `width`, the `base_sha256` that its embeddings paint
with, whether they are `masked`, what is `frozen`, its `identity` in the run's record, which rows of an index it knows
(`of`), its `blocks` that can be compiled, and how a sample is read and embedded.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.hierarchy import Hierarchy
from ...kernels.precision import autocast, frozen_dtype
from ..data.index import Index
from ..files import file_hash
from ..frozen.base import base_sha256
from ..frozen.encoders import check_towers, load_towers, tower_config
from ..objectives.reconstruct import load_adapter
from .edit_reader import CachedFeatures, EditReader, Side
from .editor_settings import Config
from .fits import Fits


class AdapterSpace:
    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        # The towers are checked even where a cache replaces them: it may hold the features of another DINOv2.
        self.adapter, record = load_adapter(config.adapter, device)
        check_towers(config.vision.named(), config.adapter, record)
        self.base_sha256, self.masked = record["base_sha256"], record["masked"]
        self.width, self.hierarchy = self.adapter.config.out_dim, self.adapter.config.hierarchy
        self.blocks, self.towers = self.adapter.layers, {}

    def load(self) -> None:
        config = self.config
        if not config.data.cache:
            self.towers = load_towers(config.vision.files, config.vision.ids, self.device,
                                      frozen_dtype(self.device, config.run.precision))
        self.frozen = {"adapter": self.adapter, **self.towers}

    @property
    def identity(self) -> dict:
        vision = self.config.vision.named()
        return {"adapter": file_hash(self.config.adapter), "base": self.base_sha256,
                "towers": {tower_config(path, name).id: base_sha256(path) for path, name in vision}}

    def of(self, index: Index) -> Index:
        return index

    def reader(self, index: Index, resolutions: tuple[int, ...], flow: bool) -> EditReader:
        cache = self.config.data.cache
        return EditReader(CachedFeatures(index, cache, self.config.vision, resolutions), flow or not cache)

    def embed(self, sides: list[Side], hierarchy: Hierarchy) -> tuple[Tensor, Tensor | None]:
        """(tokens [B, T, D] float32, pooled [B, P] or None) of all pictures of the sides, one side after the other."""
        with torch.no_grad(), autocast(self.device, self.config.run.precision):
            if self.towers:
                images = torch.cat([images for images, _ in sides])
                features = {name: tower(images) for name, tower in self.towers.items()}
            else:
                features = {name: torch.cat([known[name] for _, known in sides]) for name in sides[0][1]}
            return self.adapter(features, hierarchy)


class FitSpace:
    """One preset, that of the fits. A pooled vector that was fitted is left out: the edit keeps its source's anyway."""

    masked, frozen, blocks = True, {}, ()

    def __init__(self, config: Config):
        self.fits = Fits(config.fits)
        if self.fits.preset != config.presets[0]:
            raise ValueError(f"The embeddings in {config.fits} are of the preset {self.fits.preset}; give it as presets and as "
                             "validation.preset.")
        self.base_sha256, self.width = self.fits.base_sha256, self.fits.width
        self.hierarchy = self.fits.hierarchy.to_json()

    def load(self) -> None:
        pass

    @property
    def identity(self) -> dict:
        return {"fits": self.fits.hash, "base": self.base_sha256}

    def of(self, index: Index) -> Index:
        return self.fits.of(index)

    def reader(self, index: Index, resolutions: tuple[int, ...], flow: bool) -> EditReader:
        return EditReader(lambda index, row, bucket, member: {"tokens": self.fits.read(index, row, member)}, flow)

    def embed(self, sides: list[Side], hierarchy: Hierarchy) -> tuple[Tensor, None]:
        return torch.cat([known["tokens"] for _, known in sides]), None


def space_of(config: Config, device: torch.device) -> AdapterSpace | FitSpace:
    return FitSpace(config) if config.fits else AdapterSpace(config, device)
