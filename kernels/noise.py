"""Noise that is a pure function of what it is for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def own_noise(shape: Iterable[int], pictures: Iterable[int], *key: int) -> Tensor:
    """[B, *shape] float32 on the CPU: standard normal, a function of the key and of each picture's number alone.

    So a picture's noise is the same on every device, in every batch, and whatever was drawn before.
    """
    shape = tuple(shape)
    return torch.stack([torch.randn(shape, generator=_generator(*key, picture)) for picture in pictures])


def _generator(*key: int) -> torch.Generator:
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
