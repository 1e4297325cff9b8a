"""Base, adapter, towers, autoencoder and edit decoder from files: they embed pictures, edit embeddings and paint.

One painter serves the miniature and FLUX.1: the files themselves say which they are.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...kernels.adapter import Adapter
from ...kernels.attention import Regions
from ...kernels.edit_decoder import EditDecoder
from ...kernels.embedding import SemanticEmbedding, from_hierarchy
from ...kernels.hierarchy import Hierarchy
from ...kernels.precision import frozen_dtype
from ...kernels.visibility import region_bias
from ..files import file_hash
from ..frozen.base import Precision, base_sha256, load_flux
from ..frozen.encoders import check_towers, load_towers, load_vae, with_ids
from ..frozen.paint import paint
from ..frozen.region_attention import attend_by_region
from ..frozen.text import load_instruction_encoder
from ..objectives.edit import load_editor
from ..objectives.reconstruct import load_adapter
from .encoders import to_pixels


@dataclass(frozen=True)
class Files:
    """The files of a painter. tower_ids: as `training/frozen/encoders.py: load_towers` takes them. The last three are
    for edits: text is the base's text encoder, which reads the instructions; its tokenizer may lie elsewhere."""

    flux: Path
    adapter: Path
    vae: Path
    towers: tuple[Path, ...]
    tower_ids: tuple[str, ...] = ()
    editor: Path | None = None
    text: Path | None = None
    tokenizer: Path | None = None


class Painter:
    """Load everything, or say in one sentence (ValueError) which files do not belong together.

    precision: of Flux, as `training/frozen/base.py: load_flux` takes it. The adapter and the edit decoder compute in
    float32, the towers in the dtype of `frozen_dtype`.
    """

    def __init__(self, files: Files, device: torch.device, precision: Precision):
        self.files, self.device = files, device
        self.hashes = {"flux": base_sha256(files.flux), "adapter": file_hash(files.adapter),
                       "vae": base_sha256(files.vae, "vae")}
        self.hashes |= {f"tower {path.name}": base_sha256(path) for path in files.towers}
        self.adapter, self.record = self._adapter()
        self.towers = self._towers()
        self.editor = self.read = None
        if files.editor is not None:
            self.hashes["editor"] = file_hash(files.editor)
            self.editor, self.read = self._editor(), load_instruction_encoder(files.text, device, files.tokenizer)
            self.hashes["text"] = self.read.hash
        self.vae = load_vae(files.vae, device)
        # the largest comes last, when everything else is known to fit
        self.flux = load_flux(files.flux, precision, device)
        attend_by_region(self.flux)

    def _adapter(self) -> tuple[Adapter, dict]:
        path = self.files.adapter
        adapter, record = load_adapter(path, self.device)
        trained, given = record.get("base_sha256"), self.hashes["flux"]
        if trained is not None and trained != given:
            raise ValueError(f"{path} was trained through another base (sha256 {trained[:12]}) than {self.files.flux} "
                             f"({given[:12]}): give the base of the adapter.")
        return adapter, record

    def _towers(self) -> dict:
        files = self.files
        check_towers(with_ids(files.towers, files.tower_ids), files.adapter, self.record)
        return load_towers(files.towers, files.tower_ids, self.device, frozen_dtype(self.device))

    def _editor(self) -> EditDecoder:
        path = self.files.editor
        editor, record = load_editor(path, self.device)
        trained = record.get("adapter_sha256")
        if trained is not None and trained != self.hashes["adapter"]:
            raise ValueError(f"{path} was trained on another adapter than {self.files.adapter}: give the edit "
                             "decoder's own.")
        return editor

    def describe(self) -> dict[str, str]:
        """{what: "file name, sha256"} of all files, for the protocol."""
        paths = {name: path for name, path in vars(self.files).items() if name in self.hashes}
        paths |= {f"tower {path.name}": path for path in self.files.towers}
        return {name: f"{path.name}, sha256 {self.hashes[name]}" for name, path in paths.items()}

    @torch.no_grad()
    def embed(self, pictures: Tensor, hierarchy: Hierarchy) -> SemanticEmbedding:
        """Pictures [B, 3, H, W] float in [0, 1] -> their embeddings; tokens float32."""
        features = {name: tower(pictures.to(self.device)) for name, tower in self.towers.items()}
        tokens, pooled = self.adapter(features, hierarchy)
        return from_hierarchy(tokens, hierarchy, pooled)

    @torch.no_grad()
    def edit(self, source: SemanticEmbedding, instructions: Sequence[str], mode: str) -> SemanticEmbedding:
        """The edit decoder's embeddings of one instruction for each source."""
        words = self.read(instructions).float()
        tokens = self.editor.generate(source.tokens, source.boxes, source.levels, words, mode)
        return from_hierarchy(tokens, source.hierarchy(), source.pooled)

    def paint(self, embedding: SemanticEmbedding, size: tuple[int, int], seeds: Sequence[int], steps: int,
              guidance: float) -> np.ndarray:
        """Pictures [B, H, W, 3] uint8 of size (height, width) that Flux paints, each from the noise of its own seed."""
        height, width = size
        regions = None
        if self.record.get("masked", True):
            side = 2 * self.vae.downsample
            boxes, strengths = embedding.boxes.cpu(), embedding.strengths.cpu()
            bias = region_bias(boxes, strengths, (height // side, width // side), embedding.token_count)
            regions = Regions(bias.to(self.device))
        made = paint(self.flux, self.vae, embedding.tokens, embedding.pooled, regions, height, width, seeds, steps,
                     guidance)
        return to_pixels(made)

    def round_trip(self, pictures: Tensor) -> np.ndarray:
        """Pictures [B, 3, H, W] float in [0, 1] through the autoencoder and back, [B, H, W, 3] uint8."""
        return to_pixels(self.vae.decode(self.vae.moments(pictures.to(self.device))[0]))


def seed_of(key: str, seed: int) -> int:
    """The seed of a picture's noise. It depends on the picture and the run's seed alone."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:7], "big")
