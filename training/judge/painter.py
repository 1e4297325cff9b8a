"""Base, adapter, towers, autoencoder and edit decoder from files: pictures to embeddings, edits of them, and pictures again.

One painter for the miniature and for FLUX.1: whether a file carries our record says which it is.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...kernels import checkpoint
from ...kernels.adapter import Adapter, AdapterConfig
from ...kernels.attention import Regions
from ...kernels.edit_decoder import EditDecoder, build_edit_decoder, read_config
from ...kernels.embedding import SemanticEmbedding, from_hierarchy
from ...kernels.hierarchy import hierarchy
from ...kernels.visibility import region_bias
from ..files import file_hash
from ..flux import build_flux, from_bfl
from ..instructions import load_instruction_encoder
from ..miniature.base import sample
from ..miniature.towers import read_tower
from ..miniature.vae import load_vae
from ..region_attention import attend_by_region


@dataclass(frozen=True)
class Files:
    """What a painter is made of. The last three are for edits: text is the base's text encoder, which reads the instructions,
    with its tokenizer where that lies elsewhere."""

    flux: Path
    adapter: Path
    vae: Path
    towers: tuple[Path, ...]
    editor: Path | None = None
    text: Path | None = None
    tokenizer: Path | None = None


class Painter:
    """Loads everything, or says in one sentence (ValueError) which files do not belong together."""

    def __init__(self, files: Files, device: torch.device, precision: str, steps: int):
        self.files, self.device, self.precision, self.steps = files, device, precision, steps
        self.hashes = {name: file_hash(path) for name, path in vars(files).items() if isinstance(path, Path)}
        self.hashes |= {f"tower {path.name}": file_hash(path) for path in files.towers}
        self.adapter, record = self._adapter()
        self.masked = record.get("masked", True)
        state, base = checkpoint.load(files.flux, "flux")
        self.flux = build_flux(base["config"])
        self.flux.load_state_dict({k: v.float() for k, v in from_bfl(state, base["config"]["hidden_size"]).items()})
        self.flux.to(device).eval().requires_grad_(False)
        self.attention = attend_by_region(self.flux)
        self.mu = base["config"]["sampling_shift_mu"]
        self.vae = load_vae(files.vae, device)
        self.towers = self._towers(record)
        self.editor = self.read = None
        if files.editor is not None:
            self.editor, self.read = self._editor(), load_instruction_encoder(files.text, device, files.tokenizer)

    def _adapter(self) -> tuple[Adapter, dict]:
        path = self.files.adapter
        state, record = checkpoint.load(path, "adapter")
        trained, given = record.get("base_sha256"), self.hashes["flux"]
        if trained is not None and trained != given:
            raise ValueError(f"{path} was trained through another base (sha256 {trained[:12]}) than {self.files.flux} ({given[:12]}): "
                             "give the base of the adapter.")
        adapter = Adapter(AdapterConfig.from_json(record["config"]))
        checkpoint.fill(adapter, {name: tensor.float() for name, tensor in state.items()}, path)
        return adapter.to(self.device).eval().requires_grad_(False), record

    def _towers(self, record: dict) -> dict:
        towers = {}
        for path in self.files.towers:
            tower = read_tower(path, self.device)
            towers[tower.config.id] = tower
            tuned = record.get("dinov2_sha256")
            if tower.config.kind == "dinov2" and tuned is not None and tuned != self.hashes[f"tower {path.name}"]:
                raise ValueError(f"{path} is not the DINOv2 that {self.files.adapter} was trained with: give the one exported with it.")
        for config in self.adapter.config.towers:
            if config.id not in towers:
                raise ValueError(f"{self.files.adapter} looks through '{config.id}', which is not among the towers "
                                 f"({', '.join(towers) or 'none'}): add its file to --towers.")
        return towers

    def _editor(self) -> EditDecoder:
        path = self.files.editor
        state, record = checkpoint.load(path, "edit_decoder")
        trained = record.get("adapter_sha256")
        if trained is not None and trained != self.hashes["adapter"]:
            raise ValueError(f"{path} was trained on another adapter than {self.files.adapter}: give the adapter of the edit decoder.")
        editor = build_edit_decoder(read_config(record["config"]))
        checkpoint.fill(editor, {name: tensor.float() for name, tensor in state.items()}, path)
        return editor.to(self.device).eval().requires_grad_(False)

    def describe(self) -> dict[str, str]:
        """{"what": "file name, sha256"} of every file, for the protocol."""
        paths = {name: path for name, path in vars(self.files).items() if isinstance(path, Path)}
        paths |= {f"tower {path.name}": path for path in self.files.towers}
        return {name: f"{path.name}, sha256 {self.hashes[name]}" for name, path in paths.items()}

    @torch.no_grad()
    def embed(self, pictures: Tensor, preset: str) -> SemanticEmbedding:
        """Pictures [B, 3, H, W] float in [0, 1] -> their embeddings; tokens float32."""
        with self._autocast():
            features = {name: tower(pictures.to(self.device)) for name, tower in self.towers.items()}
            tokens, pooled = self.adapter(features, hierarchy(preset))
        return from_hierarchy(tokens.float(), hierarchy(preset), pooled)

    @torch.no_grad()
    def edit(self, source: SemanticEmbedding, instructions: Sequence[str], mode: str) -> SemanticEmbedding:
        """The edit decoder's embeddings of one instruction for each source."""
        tokens = self.editor.generate(source.tokens, source.boxes, source.levels, self.read(instructions).float(), mode)
        return from_hierarchy(tokens, source.hierarchy(), source.pooled)

    @torch.no_grad()
    def paint(self, embedding: SemanticEmbedding, size: tuple[int, int], keys: Sequence[str], seed: int) -> np.ndarray:
        """Pictures [B, H, W, 3] uint8 of size (height, width) that Flux paints, each from the noise of its key and the seed."""
        noise = noise_of(keys, seed, self.latent_shape(size)).to(self.device)
        grid = (noise.shape[-2] // 2, noise.shape[-1] // 2)
        bias = region_bias(embedding.boxes.cpu(), embedding.strengths.cpu(), grid, embedding.token_count)
        self.attention.regions = Regions(bias.to(self.device)) if self.masked else None
        pooled = embedding.pooled
        if pooled is None:
            pooled = noise.new_zeros(embedding.batch, self.flux.config.pooled_projection_dim)
        with self._autocast():
            latents = sample(self.flux, [(embedding.tokens, pooled)], [1.0], noise, self.steps, self.mu)
        return self.decode(latents)

    @torch.no_grad()
    def round_trip(self, pictures: Tensor) -> np.ndarray:
        """Pictures [B, 3, H, W] float in [0, 1] through the autoencoder and back, [B, H, W, 3] uint8: the ceiling."""
        with self._autocast():
            latents = self.vae.encode(pictures.to(self.device) * 2 - 1).latent_dist.mean
        return self.decode(latents.float())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        with self._autocast():
            pictures = self.vae.decode(latents).sample.float()
        return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).cpu().numpy()

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return (self.vae.config.latent_channels, size[0] // 8, size[1] // 8)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def noise_of(keys: Sequence[str], seed: int, shape: tuple[int, ...]) -> Tensor:
    """[N, *shape] float32 standard normal noise: a pure function of the seed and each key, whatever else is painted."""
    draws = []
    for key in keys:
        entropy = int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:16], "big")
        draws.append(np.random.default_rng(entropy).standard_normal(shape, dtype=np.float32))
    return torch.from_numpy(np.stack(draws))
