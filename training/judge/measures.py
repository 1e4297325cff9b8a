"""The measures of a reconstruction and of an edit: their names and the files they need."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import metrics
from .encoders import load_encoder, to_tensor
from .samples import Sample


@dataclass(frozen=True)
class Measure:
    """One measure. label and better ("higher" or "lower") are for the page. needs: the key of the configuration whose
    file it takes."""

    label: str
    better: str
    needs: str
    what: str


_TO_SOURCE = "the same against the source: how much was kept"
MEASURES = {
    "dino": Measure("DINO-I", "higher", "dino",
                    "cosine of DINO's class tokens; for edits against the true edited picture"),
    "clip_i": Measure("CLIP-I", "higher", "clip",
                      "cosine of CLIP's image features; for edits against the true edited picture"),
    "structure": Measure("Structure", "lower", "structure",
                         "squared difference of the self-similarities of DINO's keys"),
    "lpips": Measure("LPIPS", "lower", "lpips", "learned perceptual distance"),
    "ssim": Measure("SSIM", "higher", "", "structural similarity, Gaussian window"),
    "psnr": Measure("PSNR, dB", "higher", "", "peak signal-to-noise ratio; equal pictures are counted apart"),
    "l1": Measure("L1", "lower", "", "mean absolute difference, 0..1; for edits against the true edited picture"),
    "clip_dir": Measure("CLIP-dir", "higher", "clip", "cosine of the change of the picture and of its caption"),
    "clip_t": Measure("CLIP-T", "higher", "clip",
                      "cosine of the edit's image feature and the target caption's text feature"),
    "clip_i_source": Measure("CLIP-I src", "higher", "clip", _TO_SOURCE),
    "dino_source": Measure("DINO src", "higher", "dino", _TO_SOURCE),
    "l1_source": Measure("L1 src", "lower", "", _TO_SOURCE),
    "structure_source": Measure("Struct. src", "lower", "structure", _TO_SOURCE),
}
RECONSTRUCTION = ("dino", "clip_i", "structure", "lpips", "ssim", "psnr")
EDITS = ("clip_dir", "clip_i", "dino", "l1", "clip_t", "clip_i_source", "dino_source", "l1_source", "structure_source")
# key of the configuration -> the download for the measures that lack it
FILES = {
    "clip": "a CLIP with both halves as a folder (of transformers or open_clip); MagicBrush takes "
    "openai/clip-vit-base-patch32",
    "dino": "a DINO as a folder; DreamBooth and MagicBrush take facebook/dino-vits16",
    "structure": "a DINO as a folder; Splice takes facebook/dino-vitb8",
    "lpips": "the safetensors of torchvision's AlexNet, SqueezeNet 1.1 or VGG-16",
}


class Judge:
    """Measure pictures with the networks that were given. `missing` says which measures are left out, and why."""

    def __init__(self, files: dict[str, Path | None], device: torch.device):
        self.device, self.networks = device, {}
        loaders = {"clip": load_encoder, "dino": load_encoder, "structure": load_encoder, "lpips": metrics.Lpips}
        for name, load in loaders.items():
            if files.get(name) is not None:
                self.networks[name] = load(files[name], device)
        if "structure" in self.networks:
            # refuses a network without keys before the work
            self.networks["structure"].keys(np.zeros((64, 64, 3), np.uint8))

    def describe(self) -> dict:
        return {name: network.describe() for name, network in self.networks.items()}

    def missing(self, names: tuple[str, ...]) -> list[dict[str, str]]:
        """[{"measure", "key", "needs"}] of those among `names` for which no file was given or whose file lacks a
        half."""
        found = []
        for name in names:
            key, label = MEASURES[name].needs, MEASURES[name].label
            if key and key not in self.networks:
                found.append({"measure": label, "key": key, "needs": FILES[key]})
            elif name in ("clip_dir", "clip_t") and not self.networks["clip"].reads:
                found.append({"measure": label, "key": key, "needs": f"{FILES[key]}; the one given has no text half"})
        return found

    def reconstruction(self, source: np.ndarray, painted: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        """RECONSTRUCTION's measures of pictures [H, W, 3] uint8 against their source, by the name of the method that
        painted them."""
        names, pictures = list(painted), [source, *painted.values()]
        values = self._against(source, pictures[1:], RECONSTRUCTION, self._features(pictures), 0)
        return dict(zip(names, values))

    def edits(self, sample: Sample, painted: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        """EDITS' measures, by the name of the method that painted."""
        pictures = [sample.source, sample.target, *painted.values()]
        features = self._features(pictures)
        to_target = self._against(sample.target, pictures[2:], ("clip_i", "dino", "l1"), features, 1)
        kept = tuple(name for name in EDITS if name.endswith("_source"))
        to_source = self._against(sample.source, pictures[2:], kept, features, 0)
        said = self._said(sample.captions, features, len(painted))
        return {name: target | source | words
                for name, target, source, words in zip(painted, to_target, to_source, said)}

    def _features(self, pictures: list[np.ndarray]) -> dict[str, Tensor]:
        return {name: self.networks[name].images(pictures) for name in ("clip", "dino") if name in self.networks}

    def _against(self, truth: np.ndarray, pictures: list[np.ndarray], names: tuple[str, ...],
                 features: dict[str, Tensor],
                 place: int) -> list[dict[str, float]]:
        """Measures `names` of pictures, the last rows of the features, against `truth`, row `place` of the features."""
        a, b = to_tensor([truth] * len(pictures)).to(self.device), to_tensor(pictures).to(self.device)
        found: dict[str, Tensor] = {}
        for name in names:
            what = name.removesuffix("_source")
            if what in ("clip_i", "dino"):
                rows = features.get("clip" if what == "clip_i" else "dino")
                if rows is not None:
                    found[name] = metrics.cosine(rows[-len(pictures):], rows[place])
            elif what == "structure":
                if "structure" in self.networks:
                    keys = self.networks["structure"].keys
                    reference = keys(truth)
                    found[name] = torch.cat([metrics.structure_distance(keys(picture), reference)
                                             for picture in pictures])
            elif what == "lpips":
                if "lpips" in self.networks:
                    found[name] = self.networks["lpips"](a, b)
            else:
                found[name] = getattr(metrics, what)(a, b)
        return [{name: float(values[i]) for name, values in found.items()} for i in range(len(pictures))]

    def _said(self, captions: tuple[str, str], features: dict[str, Tensor], count: int) -> list[dict[str, float]]:
        """The measures that need captions (of source and target), for the pictures whose features are the last
        `count`."""
        before, after = captions
        if "clip" not in features or not self.networks["clip"].reads or not after:
            return [{}] * count
        source, edited = features["clip"][:1], features["clip"][-count:]
        text = self.networks["clip"].texts([before, after])
        found = {"clip_t": metrics.cosine(edited, text[1:])}
        if before:
            found["clip_dir"] = metrics.directional(source.expand_as(edited), edited, text[:1], text[1:])
        return [{name: float(values[i]) for name, values in found.items()} for i in range(count)]
