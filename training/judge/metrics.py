"""The measures of judging: how alike two pictures are, in pixels, features, structure, and in what has changed.

Pictures are tensors [B, 3, H, W] float32 in [0, 1], features are rows [B, D]. Every function gives one number per row,
[B]. The networks are in encoders.py, so that every formula here can be checked by hand.
"""
from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ...kernels import checkpoint, weights
from ..files import file_hash


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB. It is infinite for equal pictures."""
    return peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3), reduction="none")


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """[B, 3, H, W]: the structural similarity (see `ssim`) of every place. The border sees reflections."""
    return structural_similarity_index_measure(a, b, data_range=1.0, sigma=1.5, reduction="none",
                                               return_full_image=True)[1]


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004). The Gaussian window has a deviation of 1.5 px and is 11 px wide. The
    mean is over the channels and over the places where the whole window lies in the picture. 1 is equal."""
    full = ssim_map(a, b)
    # Releases of torchmetrics differ in whether their own mean counts the border, where the window sees reflections.
    return full[..., 5:-5, 5:-5].mean((1, 2, 3))


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference, 0..1."""
    return (a - b).abs().mean((1, 2, 3))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of two rows of features, -1..1: CLIP-I, DINO-I or CLIP-T, depending on the encoder."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1)


def directional(source: Tensor, edited: Tensor, source_text: Tensor, edited_text: Tensor) -> Tensor:
    """CLIP-directional similarity (StyleGAN-NADA, arXiv 2108.00946): the cosine between the change of the picture and
    the change of its caption, of features of unit length; 0 where nothing has changed."""
    features = (source, edited, source_text, edited_text)
    before, after, said_before, said_after = (F.normalize(x.float(), dim=-1) for x in features)
    return cosine(after - before, said_after - said_before)


def self_similarity(keys: Tensor) -> Tensor:
    """keys [B, N, D] of a picture's tokens -> the cosine of every pair, [B, N, N]."""
    unit = F.normalize(keys.float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def structure_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of the self-similarities of two pictures' keys [B, N, D] (Splice, arXiv 2201.00424; PnP
    Inversion, arXiv 2310.01506, prints it times 1000). Their keys are those of DINO ViT-B/8's last layer, class token
    included."""
    return (self_similarity(a) - self_similarity(b)).square().mean((1, 2))


class Lpips(nn.Module):
    """LPIPS (Zhang et al., arXiv 1801.03924) version 0.1 by the `lpips` library: its heads on a backbone from a local
    file.

    path: safetensors of torchvision's AlexNet, SqueezeNet 1.1 or VGG-16 trained on ImageNet (`features.*`). The file's
    tensors tell which it is. ValueError for any other file.
    """

    def __init__(self, path: Path, device: torch.device | None = None):
        super().__init__()
        import lpips

        state = {name: tensor for name, tensor in checkpoint.load_tensors(path).items() if name.startswith("features.")}
        self.backbone = backbone_of(state, path)
        with warnings.catch_warnings():  # torchvision warns about how lpips asks for a network without weights
            warnings.simplefilter("ignore")
            self.model = lpips.LPIPS(net=self.backbone, pnet_rand=True, verbose=False)
        # "slice2.3.weight" is layer 3 of torchvision's `features`; the layers after the last slice are not used.
        own = {name: f"features.{name.split('.', 1)[1]}" for name in self.model.net.state_dict()}
        weights.fill(self.model.net, {name: state[theirs] for name, theirs in own.items() if theirs in state}, path)
        self.path = path
        self.to(device).requires_grad_(False).eval()

    def describe(self) -> dict[str, str]:
        """The protocol's entry for it."""
        return {"kind": f"LPIPS 0.1, {self.backbone}", "file": str(self.path), "sha256": file_hash(self.path)}

    @torch.no_grad()
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.model(a, b, normalize=True).reshape(len(a))


def backbone_of(state: dict[str, Tensor], path: Path) -> str:
    """"alex", "squeeze" or "vgg", by a file's tensors."""
    if "features.3.squeeze.weight" in state:
        return "squeeze"
    first = state.get("features.0.weight")
    sides = {11: "alex", 3: "vgg"}
    if first is None or first.ndim != 4 or first.shape[-1] not in sides:
        raise ValueError(f"{path} is not a backbone of LPIPS: "
                         "give the safetensors of torchvision's AlexNet, SqueezeNet 1.1 or VGG-16.")
    return sides[first.shape[-1]]


def summary(values: Sequence[float]) -> dict[str, float | int | None]:
    """{"mean", "error", "count", "infinite"}: the mean, its standard error (None for a single value) and the number of
    values. Infinite values (the PSNR of equal pictures) are counted apart: a single one would hide all others."""
    finite = [value for value in values if math.isfinite(value)]
    count = len(finite)
    mean = sum(finite) / count if count else None
    error = None
    if count > 1:
        error = math.sqrt(sum((value - mean) ** 2 for value in finite) / (count - 1) / count)
    return {"mean": mean, "error": error, "count": count, "infinite": len(values) - count}
