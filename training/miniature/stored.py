"""What is made once of the training scenes and kept on disk: their codes, and their latents, which cost as much to make as
to train on. First come the ordinary scenes, then the crowds (scenes.numbered)."""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ...kernels.precision import autocast
from ...kernels.replace import replacing
from ..engine.ahead import in_order
from ..files import file_hash
from .drawing import codes, draw, scene_of
from .scenes import Scene, numbered, scene
from .vae import load_vae

BATCH = 256


@dataclass(frozen=True)
class Scenes:
    """things [N, 6, 6] float32 and grounds [N] int64 (drawing.codes) of training scenes, of which the first `ordinary`
    are no crowds."""

    things: np.ndarray
    grounds: np.ndarray
    ordinary: int

    def __len__(self) -> int:
        return len(self.grounds)

    def __getitem__(self, number: int) -> Scene:
        return scene_of(self.things[number], int(self.grounds[number]))

    def of(self, numbers) -> dict[str, Tensor]:
        """The codes of scenes by their numbers [B]."""
        numbers = np.asarray(numbers)
        return {"things": torch.from_numpy(self.things[numbers]), "grounds": torch.from_numpy(self.grounds[numbers])}


def _codes(scenes: int, total: int, first: int) -> dict[str, Tensor]:
    return codes([scene(*numbered(number, scenes)) for number in range(first, min(total, first + BATCH))])


def training_scenes(scenes: int, crowds: int, folder: Path, device: torch.device) -> Scenes:
    """The codes of the training scenes and crowds; other processes make them where the device is a GPU."""
    path, total = folder / f"scenes_{scenes}_{crowds}.npz", scenes + crowds
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = list(in_order(partial(_codes, scenes, total), range(0, total, BATCH), device))
        things, grounds = (torch.cat([each[key] for each in made]).numpy() for key in ("things", "grounds"))
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, things=things, grounds=grounds)
    try:
        with np.load(path) as kept:
            return Scenes(kept["things"], kept["grounds"], scenes)
    except (ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} is damaged: delete it, and the same command makes it again.") from error


def training_latents(vae_path: Path, scenes: Scenes, folder: Path, device: torch.device) -> Tensor:
    """Posterior means of all of the scenes: [N, 8, 16, 16] float16 on the device. The file is keyed by the VAE's hash;
    what was stopped goes on."""
    key = f"{file_hash(vae_path)[:16]}_{scenes.ordinary}_{len(scenes) - scenes.ordinary}"
    done, path = folder / f"{key}.done", folder / f"{key}.npy"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        vae, counter = load_vae(vae_path, device), path.with_suffix(".count")
        start = int(counter.read_text()) if counter.exists() else 0
        store = np.lib.format.open_memmap(path, mode="r+" if start else "w+", dtype=np.float16,
                                          shape=(len(scenes), 8, 16, 16))
        for first in range(start, len(scenes), BATCH):
            rows = range(first, min(len(scenes), first + BATCH))
            with torch.no_grad(), autocast(device):
                x = draw(**{name: each.to(device) for name, each in scenes.of(rows).items()})
                x = x.to(memory_format=torch.channels_last)
                store[rows.start:rows.stop] = vae.encode(x).latent_dist.mean.float().cpu().numpy()
            if first % (BATCH * 16) == 0:
                store.flush()
                counter.write_text(str(first))
                print(f"latents: {first}/{len(scenes)}", flush=True)
        store.flush()
        done.touch()
    return torch.from_numpy(np.load(path)).to(device)


def take(store: Tensor, numbers: Tensor) -> Tensor:
    """Rows of the store in float32. numbers: [B] on its device."""
    return store[numbers].float()
