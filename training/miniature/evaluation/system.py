"""The trained miniature, loaded to be measured: pictures to embeddings, embeddings and texts to pictures.

Everything works in batches of 32, in what the device computes fast. On a CPU every core paints its own batches, which
at this width is faster than all cores on one batch. The noise of a picture is a pure function of (split, seed, scene),
so two decoders of one scene start from the same noise.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ....kernels.adapter import Adapter
from ....kernels.attention import Regions
from ....kernels.edit_decoder import EditDecoder
from ....kernels.embedding import SemanticEmbedding, from_hierarchy
from ....kernels.hierarchy import Hierarchy
from ....kernels.layout import decode as decode_layout
from ....kernels.layout import encode as encode_layout
from ....kernels.layout import together
from ....kernels.precision import autocast, resolve
from ....kernels.visibility import patch_grid, region_bias
from ....kernels.vision.towers import VisionTower
from ...frozen.flux import velocity
from ...objectives.edit import load_editor
from ...objectives.gate import merge_lora
from ...objectives.reconstruct import load_adapter, named_hierarchy
from ..base import load_base, load_flux, sample
from ..scenes import SIZE, generator
from ..text import encode, load_text_encoder, token_ids
from ..towers import read_tower
from ..vae import load_vae, to_pixels, to_tensor
from .attention import Attention

ASSETS = Path(__file__).resolve().parents[3] / "assets" / "miniature"
BATCH = 32
STEPS = 20  # of the sampler
GUIDANCE = 2.5  # classifier-free guidance wherever a text is the prompt
_NOISE = 77  # this purpose of scenes.generator

# What is loaded: (file, the command that makes it).
_VAE = ("vae/miniature_vae", "vae")
_FLUX = ("diffusion_models/miniature_flux", "base")
_TEXT = ("text_encoders/miniature_t5", "base")
_CLIP = ("clip_vision/miniature_clip", "clip")
_EDITOR = ("edit_decoders/miniature_editor", "editor")
_GATE = ("loras/miniature_gate", "gate")
_FROM_FITS = ("ablations/edit_decoders/miniature_editor_from_fits", "editor-from-fits")
# adapter -> (its file, its own DINOv2 tower, the command that makes both). The ablations lie apart, where no node lists
# them.
ADAPTERS = {
    "tree128": ("semantic_adapters/miniature_tree128", "clip_vision/miniature_dinov2", "adapter"),
    "tree64_unmasked": ("ablations/semantic_adapters/miniature_tree64_unmasked",
                        "ablations/clip_vision/miniature_dinov2_tree64_unmasked", "adapter-unmasked"),
    "global64": ("ablations/semantic_adapters/miniature_global64", "ablations/clip_vision/miniature_dinov2_global64",
                 "adapter-global64"),
}


@dataclass(frozen=True)
class Variant:
    """A way to embed: one of the adapters at one of its presets."""

    adapter: str
    preset: str

    @property
    def hierarchy(self) -> Hierarchy:
        return named_hierarchy(self.preset)


VARIANTS = {
    **{preset: Variant("tree128", preset) for preset in ("global16", "global32", "tree64", "tree112", "tree128")},
    "tree64_unmasked": Variant("tree64_unmasked", "tree64"),
    "global64": Variant("global64", "global64"),
}


@dataclass(frozen=True)
class Encoder:
    """An adapter with its towers; `masked` says whether Flux decodes its embeddings under their visibility."""

    adapter: Adapter
    towers: dict[str, VisionTower]
    masked: bool


def left_out(assets: Path) -> dict[str, str]:
    """The ablations whose files are not there, with the command that makes each."""
    return {name: f"sda miniature {command}" for name, (file, _, command) in ADAPTERS.items()
            if name != "tree128" and not (assets / f"{file}.safetensors").is_file()}


def has_editor_from_fits(assets: Path) -> bool:
    return (assets / f"{_FROM_FITS[0]}.safetensors").is_file()


def noise_of(split: str, indices: Sequence[int], seed: int, shape: tuple[int, int, int]) -> Tensor:
    """[N, *shape] float32: standard normal noise, a pure function of the split, the seed and each scene's number."""
    draws = [generator(split, int(i), _NOISE, seed).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(draws))


def _read(assets: Path, file: tuple[str, str], load: Callable):
    """load(path) of one of the files. ValueError in one sentence, with the command, where the file is missing or does
    not fit."""
    path, command = assets / f"{file[0]}.safetensors", f"`sda miniature {file[1]}`"
    remedy = f"get the repository's file back or train it with {command}."
    if not path.is_file():
        raise ValueError(f"The weights {path} are missing: {remedy}")
    try:
        return load(path)
    except ValueError as error:
        reason = str(error).split(": ")[0].rstrip(".")  # its remedy is for files that are shared singly
        raise ValueError(f"{reason if str(path) in reason else f'{path}: {reason}'}: {remedy}") from error
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not fit this version of the pack: {remedy}") from error


class Miniature:
    """Every network of the miniature, frozen, with the adapters in `adapters`. `progress(pictures)` is called as
    pictures are painted."""

    def __init__(self, assets: Path, device: torch.device, progress: Callable[[int], object] = lambda pictures: None,
                 adapters: Sequence[str] = tuple(ADAPTERS)):
        self.device, self.progress = device, progress
        self.precision = resolve("auto", device)
        self.vae = _read(assets, _VAE, lambda path: load_vae(path, device))
        self.text = _read(assets, _TEXT, lambda path: load_text_encoder(path, device))
        text_file = assets / f"{_TEXT[0]}.safetensors"
        self.flux, _, record = _read(assets, _FLUX, lambda path: load_base(path, text_file, device))
        self.attention = Attention()
        self.flux.set_attn_processor(self.attention)
        self.gated = _read(assets, _FLUX, lambda path: load_flux(path, device))[0]  # with the gate's LoRA
        _read(assets, _GATE, lambda path: merge_lora(self.gated, path))
        self.gated.set_attn_processor(self.attention)
        self.mu, latent = record["config"]["sampling_shift_mu"], record["config"]["latent"]
        self.latent_shape = (latent["channels"], SIZE // latent["downsample"], SIZE // latent["downsample"])
        clip = _read(assets, _CLIP, lambda path: read_tower(path, device))
        self.encoders = {}
        for name in adapters:
            file, tower, command = ADAPTERS[name]
            adapter, kept = _read(assets, (file, command), lambda path: load_adapter(path, device))
            dinov2 = _read(assets, (tower, command), lambda path: read_tower(path, device))
            self.encoders[name] = Encoder(adapter, {t.config.id: t for t in (clip, dinov2)}, kept["masked"])
        self.editor = _read(assets, _EDITOR, lambda path: load_editor(path, device))[0]
        self.editor_from_fits = None
        if has_editor_from_fits(assets):
            self.editor_from_fits = _read(assets, _FROM_FITS, lambda path: load_editor(path, device))[0]

    def noise(self, split: str, indices: Sequence[int], seed: int) -> Tensor:
        return noise_of(split, indices, seed, self.latent_shape)

    @property
    def variants(self) -> tuple[str, ...]:
        """The names in VARIANTS whose adapters are loaded."""
        return tuple(name for name, variant in VARIANTS.items() if variant.adapter in self.encoders)

    @torch.no_grad()
    def embed(self, pictures: Sequence[np.ndarray], variant: str) -> SemanticEmbedding:
        """Pictures [N, 128, 128, 3] uint8 -> their embeddings, tokens float32 on the CPU."""
        chosen, tokens = VARIANTS[variant], []
        encoder = self.encoders[chosen.adapter]
        for first in range(0, len(pictures), BATCH):
            x = (to_tensor(list(pictures[first:first + BATCH])).to(self.device) + 1) / 2
            with autocast(self.device, self.precision):
                features = {name: tower(x) for name, tower in encoder.towers.items()}
                tokens.append(encoder.adapter(features, chosen.hierarchy)[0].float().cpu())
        return from_hierarchy(torch.cat(tokens), chosen.hierarchy)

    @torch.no_grad()
    def edit(self, source: SemanticEmbedding, instructions: Sequence[str], mode: str,
             editor: EditDecoder | None = None) -> SemanticEmbedding:
        """The embeddings that an edit decoder (None: the shipped one) writes for the instructions, one for each source.
        mode: as EditDecoder.generate takes it."""
        editor, tokens = editor or self.editor, []
        for first in range(0, len(instructions), BATCH):
            words, _ = encode(self.text, token_ids(list(instructions[first:first + BATCH]), self.device))
            batch = source.tokens[first:first + BATCH].to(self.device)
            tokens.append(editor.generate(batch, source.boxes, source.levels, words, mode).cpu())
        return from_hierarchy(torch.cat(tokens), source.hierarchy())

    def paint(self, embedding: SemanticEmbedding, variant: str, noise: Tensor) -> np.ndarray:
        """Pictures [N, 128, 128, 3] uint8 that Flux paints from embeddings of a variant, under its visibility if
        masked."""
        masked = self.encoders[VARIANTS[variant].adapter].masked
        return self.paint_regions(embedding if masked else None, [embedding.tokens], [1.0], noise)

    def paint_regions(self, layout: SemanticEmbedding | None, tokens: Sequence[Tensor], weights: list[float],
                      noise: Tensor) -> np.ndarray:
        """Pictures [N, 128, 128, 3] uint8 along the sum of weights x velocities of token sequences [N, L, D], whose
        first tokens are those of `layout` and are seen as it says. None: every patch sees every token."""
        def contexts(rows: slice):
            parts = [part[rows].to(self.device) for part in tokens]
            return [(part, part.new_zeros(len(part), self.flux.config.pooled_projection_dim)) for part in parts]

        self.attention.regions = None if layout is None else self._visibility(layout, tokens[0].shape[1])
        return self._paint(contexts, weights, noise)

    def paint_each(self, embeddings: Sequence[SemanticEmbedding], noise: Tensor) -> np.ndarray:
        """Pictures [N, 128, 128, 3] uint8 of N embeddings of one picture each, every one under a layout of its own."""
        order = sorted(range(len(embeddings)), key=lambda at: embeddings[at].token_count)  # a batch is as long as its longest
        sides = [(embeddings[at].tokens, *encode_layout(embeddings[at])) for at in order]
        noise = noise[order]

        def latents(rows: slice) -> Tensor:
            tokens, layout, masks = together(sides[rows])
            boxes, strengths, masks, masked_by = decode_layout(layout, masks)
            bias = region_bias(boxes, strengths, self.grid, tokens.shape[1], masks=masks, masked_by=masked_by)
            context = (tokens.to(self.device), tokens.new_zeros(len(tokens), self.flux.config.pooled_projection_dim))
            regions = Regions(bias.to(self.device))
            with torch.no_grad(), autocast(self.device, self.precision), self.attention.under(regions):
                return sample(self.flux, [context], [1.0], noise[rows].to(self.device), steps=STEPS, mu=self.mu)

        pictures = self._pictures(len(order), latents)
        return pictures[np.argsort(order)]

    def paint_text(self, prompts: Sequence[str], noise: Tensor, latents: Tensor | None = None,
                   start: float = 1.0) -> np.ndarray:
        """Pictures [N, 128, 128, 3] uint8 of prompts at guidance 2.5. With latents [N, C, h, w]: SDEdit (arXiv
        2108.01073), which begins at time `start` from the latents with that much noise."""
        def contexts(rows: slice):
            words = list(prompts[rows])
            return [encode(self.text, token_ids(texts, self.device)) for texts in (words, [""] * len(words))]

        self.attention.regions = None
        x = noise if latents is None else (1 - start) * latents + start * noise
        return self._paint(contexts, [GUIDANCE, 1 - GUIDANCE], x, start)

    @torch.no_grad()
    def latents(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """[N, C, h, w] float32 on the CPU: the autoencoder's latents of pictures."""
        means = []
        for first in range(0, len(pictures), BATCH):
            x = to_tensor(list(pictures[first:first + BATCH])).to(self.device, memory_format=torch.channels_last)
            with autocast(self.device, self.precision):
                means.append(self.vae.encode(x).latent_dist.mean.float().cpu())
        return torch.cat(means)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Pictures [N, 128, 128, 3] uint8 of latents."""
        pictures = []
        for part in latents.split(BATCH):
            with autocast(self.device, self.precision):
                pictures.append(to_pixels(self.vae.decode(part.to(self.device)).sample))
        return np.concatenate(pictures)

    def paint_by(self, layout: SemanticEmbedding, count: int, work: Callable[[slice], Tensor]) -> np.ndarray:
        """Pictures [N, 128, 128, 3] uint8 of the latents that work(rows) makes of every batch of them, by `velocity` with
        the tokens of `layout`."""
        self.attention.regions = self._visibility(layout, layout.token_count)
        return self._pictures(count, work)

    def velocity(self, x: Tensor, time: float, tokens: Tensor, reference: Tensor | None = None) -> Tensor:
        """What Flux predicts of latents x on its device, at one time, under the layout that was set last; beside a reference
        Flux with the gate's LoRA, within `attention.beside`."""
        pooled = tokens.new_zeros(len(tokens), self.flux.config.pooled_projection_dim)
        t = torch.full((len(x),), float(time), device=x.device)
        with torch.no_grad(), autocast(self.device, self.precision):
            return velocity(self.flux if reference is None else self.gated, x, t, tokens, pooled, reference=reference).float()

    def beside(self, layout: SemanticEmbedding) -> Regions:
        """The visibility of an embedding whose picture has a reference behind it."""
        rows, cols = self.grid
        bias = region_bias(layout.boxes, layout.strengths, (rows, cols), layout.token_count, rows * cols, masks=layout.masks,
                           masked_by=layout.masked_by)
        return Regions(bias.to(self.device))

    def velocities(self, e: SemanticEmbedding, x: Tensor, time: float) -> Tensor:
        """`velocity` of any number of latents under an embedding, on the CPU."""
        self.attention.regions = self._visibility(e, e.token_count)
        parts = zip(x.split(BATCH), e.tokens.split(BATCH))
        return torch.cat([self.velocity(a.to(self.device), time, b.to(self.device)).cpu() for a, b in parts])

    def _paint(self, contexts: Callable, weights: list[float], x: Tensor, start: float = 1.0) -> np.ndarray:
        def latents(rows: slice) -> Tensor:
            with torch.no_grad(), autocast(self.device, self.precision):
                return sample(self.flux, contexts(rows), weights, x[rows].to(self.device), steps=STEPS, mu=self.mu, start=start)

        return self._pictures(len(x), latents)

    def _pictures(self, count: int, latents: Callable[[slice], Tensor]) -> np.ndarray:
        threads = torch.get_num_threads()
        workers = threads if self.device.type == "cpu" else 1
        size = min(BATCH, -(-count // workers))  # few pictures are shared out as well

        def batch(first: int) -> np.ndarray:
            part = latents(slice(first, min(first + size, count)))
            pictures = self.decode(part)
            self.progress(len(part))
            return pictures

        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
                return np.concatenate(list(pool.map(batch, range(0, count, size))))
        finally:
            torch.set_num_threads(threads)

    @property
    def grid(self) -> tuple[int, int]:
        return patch_grid(*self.latent_shape[1:])

    def _visibility(self, layout: SemanticEmbedding, length: int) -> Regions:
        bias = region_bias(layout.boxes, layout.strengths, self.grid, length, masks=layout.masks, masked_by=layout.masked_by)
        return Regions(bias.to(self.device))
