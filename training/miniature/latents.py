"""Latents of the first N scenes of a split, made once and kept on disk: encoding costs as much as training on them."""
from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...kernels.precision import autocast
from ..engine.ahead import in_order
from ..files import file_hash
from .drawing import codes, draw
from .scenes import scene
from .vae import load_vae

__all__ = ["cached_latents", "file_hash", "take", "training_latents"]
BATCH = 256


def _codes(split: str, count: int, first: int) -> dict[str, Tensor]:
    return codes([scene(split, index) for index in range(first, min(count, first + BATCH))])


def cached_latents(vae_path: Path, split: str, count: int, folder: Path, device: torch.device) -> np.ndarray:
    """Posterior means [count, 8, 16, 16] float16 as a read-only memory map, keyed by the VAE's hash; resumable."""
    key = file_hash(vae_path)[:16]
    done, path = folder / f"{key}_{split}_{count}.done", folder / f"{key}_{split}_{count}.npy"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        vae, counter = load_vae(vae_path, device), path.with_suffix(".count")
        start = int(counter.read_text()) if counter.exists() else 0
        store = np.lib.format.open_memmap(path, mode="r+" if start else "w+", dtype=np.float16,
                                          shape=(count, 8, 16, 16))
        firsts = range(start, count, BATCH)
        for first, made in zip(firsts, in_order(partial(_codes, split, count), firsts, device)):
            with torch.no_grad(), autocast(device):
                x = draw(**{name: each.to(device) for name, each in made.items()})
                x = x.to(memory_format=torch.channels_last)
                store[first:first + len(x)] = vae.encode(x).latent_dist.mean.float().cpu().numpy()
            if first % (BATCH * 16) == 0:
                store.flush()
                counter.write_text(str(first))
                print(f"latents of {split}: {first}/{count}", flush=True)
        store.flush()
        done.touch()
    return np.load(path, mmap_mode="r")


def training_latents(vae_path: Path, scenes: int, crowds: int, folder: Path, device: torch.device) -> Tensor:
    """Of the training scenes, then of the crowds (scenes.numbered): [scenes + crowds, 8, 16, 16] float16 on the
    device."""
    parts = [cached_latents(vae_path, split, count, folder, device)
             for split, count in (("train", scenes), ("crowd_train", crowds)) if count]
    return torch.from_numpy(np.concatenate(parts)).to(device)


def take(store: Tensor, index: Tensor) -> Tensor:
    """Rows of the store in float32. index: [B] on its device."""
    return store[index].float()
