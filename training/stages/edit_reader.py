"""Samples of `sda train editor`: the two pictures of an edit, their cached tower features, and the instruction."""
from __future__ import annotations

import torch
from torch import Tensor

from ..data.decode import decode_edit, send
from ..data.index import Index, buckets
from ..data.read_cache import Cache, Part
from ..frozen.base import base_sha256
from ..frozen.encoders import tower_config
from .settings import Vision

Side = tuple[Tensor, dict[str, Tensor]]
"""One picture [3, H, W] uint8 (empty where nothing reads it) and its cached features, tower id -> [N, C]."""


class EditReader:
    """(index, row, bucket) -> (source, target, instruction), both of them a Side.

    cache: the folder that `sda cache` filled, "" for none. With a cache only the flow loss needs the pictures. Raises
    ValueError where the cache lacks a sample, CorruptSample where one cannot be read.
    """

    def __init__(self, index: Index, cache: str, vision: Vision, resolutions: tuple[int, ...], pictures: bool):
        self.pictures, self.caches = pictures or not cache, {}
        self.resolution = {bucket: r for r in resolutions for bucket in buckets(r)}
        if cache:
            for path, name in vision.named():
                tower = tower_config(path, name).id
                self.caches[tower] = Cache(cache, index, Part(tower, base_sha256(path)), resolutions)

    def __call__(self, index: Index, row: int, bucket: tuple[int, int]) -> tuple[Side, Side, str]:
        nothing = torch.empty(0)
        source, target, text = decode_edit(index, row, bucket) if self.pictures else (nothing, nothing, index[row]["caption"])
        return (source, self.features(row, bucket, "")), (target, self.features(row, bucket, "target")), text

    def features(self, row: int, bucket: tuple[int, int], member: str) -> dict[str, Tensor]:
        return {tower: cache.read(row, self.resolution[bucket], member)["features"].float()
                for tower, cache in self.caches.items()}


def sent(sides: list[Side], device: torch.device) -> Side:
    """Pictures [B, 3, H, W] in [0, 1] and features [B, N, C] of samples of one bucket, on the device."""
    images, features = zip(*sides)
    return send(images, device), {tower: send([each[tower] for each in features], device) for tower in features[0]}
