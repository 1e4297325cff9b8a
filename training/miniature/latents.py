"""Latents of the first N scenes of a split, made once and kept on disk: encoding costs as much as training on them."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...kernels.precision import autocast
from ..files import file_hash
from .vae import images, load_vae


def cached_latents(vae_path: Path, split: str, count: int, folder: Path, device: torch.device) -> np.ndarray:
    """Posterior means [count, 8, 16, 16] float16 as a read-only memory map, keyed by the VAE's hash; resumable."""
    key = file_hash(vae_path)[:16]
    done, path, batch = folder / f"{key}_{split}_{count}.done", folder / f"{key}_{split}_{count}.npy", 64
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        vae, counter = load_vae(vae_path, device), path.with_suffix(".count")
        start = int(counter.read_text()) if counter.exists() else 0
        store = np.lib.format.open_memmap(path, mode="r+" if start else "w+", dtype=np.float16,
                                          shape=(count, 8, 16, 16))
        for first in range(start, count, batch):
            index = range(first, min(count, first + batch))
            with torch.no_grad(), autocast(device):
                x = images(split, index).to(device, memory_format=torch.channels_last)
                store[first:first + len(index)] = vae.encode(x).latent_dist.mean.float().cpu().numpy()
            if first % (batch * 64) == 0:
                store.flush()
                counter.write_text(str(first))
                print(f"latents of {split}: {first}/{count}", flush=True)
        store.flush()
        done.touch()
    return np.load(path, mmap_mode="r")


def take(store: np.ndarray, index, device: torch.device) -> Tensor:
    """Rows of the store as float32 on the device."""
    return torch.from_numpy(np.asarray(store[np.asarray(index)], np.float32)).to(device)
