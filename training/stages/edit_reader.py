"""Samples of `sda train editor`: the two pictures of an edit, what is known of them, and the instruction."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..data.decode import decode_edit, send
from ..data.index import Index, buckets
from ..data.read_cache import Cache, Part
from ..frozen.base import base_sha256
from ..frozen.encoders import tower_config
from .settings import Vision

Side = tuple[Tensor, dict[str, Tensor]]
"""One picture [3, H, W] uint8 (empty where nothing reads it), and what is known of it by name: its cached features, tower
id -> [N, C], or its fitted tokens."""
Known = Callable[[Index, int, tuple[int, int], str], dict[str, Tensor]]
"""(index, row, bucket, member) -> what is known of a picture; member: "" or "target"."""


class EditReader:
    """(index, row, bucket) -> (source, target, instruction), both of them a Side. Raises CorruptSample where a sample
    cannot be read.

    pictures: whether the pictures themselves are needed.
    """

    def __init__(self, known: Known, pictures: bool):
        self.known, self.pictures = known, pictures

    def __call__(self, index: Index, row: int, bucket: tuple[int, int]) -> tuple[Side, Side, str]:
        nothing = torch.empty(0)
        source, target, text = decode_edit(index, row, bucket) if self.pictures else (nothing, nothing, index[row]["caption"])
        return (source, self.known(index, row, bucket, "")), (target, self.known(index, row, bucket, "target")), text


class CachedFeatures:
    """Known of an index's pictures is what `sda cache` kept of every tower. ValueError where the cache lacks one."""

    def __init__(self, index: Index, cache: str, vision: Vision, resolutions: tuple[int, ...]):
        self.resolution, self.caches = {bucket: r for r in resolutions for bucket in buckets(r)}, {}
        if cache:
            for path, name in vision.named():
                tower = tower_config(path, name).id
                self.caches[tower] = Cache(cache, index, Part(tower, base_sha256(path)), resolutions)

    def __call__(self, index: Index, row: int, bucket: tuple[int, int], member: str) -> dict[str, Tensor]:
        return {tower: cache.read(row, self.resolution[bucket], member)["features"].float()
                for tower, cache in self.caches.items()}


def sent(sides: list[Side], device: torch.device) -> Side:
    """Pictures [B, 3, H, W] in [0, 1] and what is known of samples of one bucket, on the device."""
    images, known = zip(*sides)
    return send(images, device), {name: send([each[name] for each in known], device) for name in known[0]}
