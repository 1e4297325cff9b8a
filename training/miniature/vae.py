"""Stage 1: a narrow AutoencoderKL (diffusers), 128 x 128 x 3 -> 16 x 16 x 8."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ...kernels import checkpoint
from ..config import RunConfig
from ..engine import Step, launch
from .drawing import codes, draw
from .parser import parse
from .scenes import COLOURS, GROUNDS, RADII, SHAPES, Scene, Thing, choice, render, scene
from .scenes import generator as generator_of
from .score import strict_f1

# Four groups, not the usual 32: with one channel to a group the norm would erase every plain ground's colour.
ARCHITECTURE = dict(
    in_channels=3, out_channels=3, latent_channels=8, sample_size=128, norm_num_groups=4, layers_per_block=1,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[32, 64, 96, 128], use_quant_conv=False, use_post_quant_conv=False,
)
MEASURED = 256  # scenes over which the scale of the latents is taken


@dataclass(frozen=True)
class Config:
    run: RunConfig
    export: Path
    scenes: int = 200_000
    kl: float = 3e-5
    """Weight of the mean KL divergence per latent number beside the errors of pixels in [-1, 1]."""
    squared: float = 4.0
    """Weight of the mean squared error beside the mean absolute one: shapes are few pixels among much ground."""
    busy: int = 2
    """Number of images of each batch that are crowded with overlapping things, for the same reason."""
    crop: int = 64
    """Side in pixels of the training windows until the rate decays; from then on whole images are used. A window lies
    around a thing, so that four times the edges fit into the same time. The whole images then teach the norms and the
    middle attention."""


def images(split: str, indices, seed: int = 0) -> Tensor:
    """Rendered scenes: [N, 3, 128, 128] float32 in [-1, 1]."""
    return draw(**codes([scene(split, int(i), seed) for i in indices]))


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """Pictures [128, 128, 3] uint8 -> [N, 3, 128, 128] float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def busy_scene(rng: np.random.Generator, things: int = 10) -> Scene:
    """A crowded scene whose things overlap each other and the border."""
    return Scene(choice(rng, tuple(GROUNDS)), tuple(
        Thing(choice(rng, SHAPES), choice(rng, tuple(COLOURS)), choice(rng, tuple(RADII)), *rng.uniform(0, 128, 2))
        for _ in range(things)))


def to_pixels(images: Tensor) -> np.ndarray:
    """[N, 3, H, W] in [-1, 1] -> [N, H, W, 3] uint8."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


class VaeStage:
    name = "vae"

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.trainables = AutoencoderKL(**ARCHITECTURE).to(device, memory_format=torch.channels_last)
        # Uncompiled, the CPU's group norm spends more time in its backward than all convolutions together.
        self.objective = torch.compile(self._objective, dynamic=False) if config.run.compile else self._objective
        self.identity: dict = {}

    def loss(self, step: Step):
        run = self.config.run
        side = self.config.crop if step.number < run.max_steps * (1 - run.decay) else 128
        windows = (128 // side) ** 2  # per sample, so that every step has as many pixels
        index = (step.rand(windows) * self.config.scenes).long().tolist()
        x = to_tensor([self.window(i, position < self.config.busy, side)
                       for position, row in zip(step.positions, index) for i in row])
        x = x.to(self.device, memory_format=torch.channels_last)
        noise = step.randn(windows, 8, side // 8, side // 8).flatten(0, 1)
        absolute, squared, kl = self.objective(x, noise)
        return absolute + self.config.squared * squared + self.config.kl * kl, {"absolute": absolute, "squared": squared, "kl": kl}

    @staticmethod
    def window(index: int, busy: bool, side: int) -> np.ndarray:
        """A square of a scene, [side, side, 3] uint8, that holds the centre of one of its things."""
        rng = generator_of("train", index, purpose=9)
        it = busy_scene(rng) if busy else scene("train", index)
        thing = it.things[rng.integers(len(it.things))]
        x, y = (int(np.clip(rng.uniform(c - side, c), 0, 128 - side)) for c in (thing.x, thing.y))
        return render(it)[y:y + side, x:x + side]

    def _objective(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.trainables.encode(x).latent_dist
        decoded = self.trainables.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - x
        return error.abs().mean(), error.square().mean(), posterior.kl().mean() / noise[0].numel()

    def scales(self, step: int) -> dict[str, float]:
        return {}

    def validate(self) -> dict[str, float]:
        truth = [scene("validation", i) for i in range(64)]
        x = images("validation", range(64)).to(self.device)
        decoded = self.trainables.decode(self.trainables.encode(x).latent_dist.mean).sample
        squared = (decoded.clamp(-1, 1) - x).square().mean((1, 2, 3))
        f1 = strict_f1(truth, [parse(p) for p in to_pixels(decoded)])
        return {"psnr": float((10 * torch.log10(4 / squared)).mean()), "f1": f1}

    @torch.no_grad()
    def unit_variance(self) -> None:
        """Scale every latent channel to unit root mean square over training scenes: exact, by moving the scale from the
        encoder's last to the decoder's first convolution. Flux then needs no scale factor."""
        vae = self.trainables
        means = torch.cat([vae.encode(images("train", range(i, i + 32)).to(self.device)).latent_dist.mean.float()
                           for i in range(0, MEASURED, 32)])
        scale = means.square().mean((0, 2, 3)).sqrt()
        last, first = vae.encoder.conv_out, vae.decoder.conv_in
        last.weight[:8] /= scale[:, None, None, None]
        last.bias[:8] /= scale
        last.bias[8:] -= 2 * scale.log()
        first.weight *= scale[None, :, None, None]

    def export(self, step: int) -> None:
        self.unit_variance()
        checkpoint.save(self.config.export, self.trainables.state_dict(), kind="vae", config=ARCHITECTURE, step=step,
                        dtype=torch.int8)


def load_vae(path: Path, device: torch.device) -> AutoencoderKL:
    state, record = checkpoint.load(path, "vae")
    vae = AutoencoderKL(**record["config"])
    vae.load_state_dict({k: v.float() for k, v in state.items()})
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def run(config: Config) -> bool:
    return launch(VaeStage, config)
