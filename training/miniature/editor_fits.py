"""The edit decoder without an adapter: trained on pairs of fitted embeddings alone, as `sda miniature fits` keeps them.

The last pairs are held out: their scenes are in no part that the decoder learns from.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ...kernels import checkpoint
from ...kernels.edit_decoder import EditDecoder, T5EditDecoderConfig, build_edit_decoder
from ..config import Count, RunConfig
from ..engine import Step, compile_blocks, launch
from ..files import file_hash
from ..objectives.edit import EditorTraining, editor_loss
from ..objectives.reconstruct import named_hierarchy
from .fits import read_part
from .text import encode, load_text_encoder, token_ids


@dataclass(frozen=True)
class Config:
    run: RunConfig
    text: Path
    fits: Path
    """Folder of the parts of `sda miniature fits`."""
    export: Path
    width: int = 144
    heads: int = 4
    layers: int = 4
    held_out: Count = 1
    """Parts that are only validated on."""
    objective: EditorTraining = field(default_factory=EditorTraining)


@dataclass(frozen=True)
class Pairs:
    """tokens [N, T, D] float16; pairs [P, 2], from which of them to which; as many instructions."""

    tokens: Tensor
    pairs: Tensor
    instructions: list[str]

    @classmethod
    def of(cls, parts: list[tuple]) -> Pairs:
        tokens, pairs, instructions, count = [], [], [], 0
        for part, rows, words, _ in parts:
            tokens.append(part)
            pairs.append(rows + count)
            instructions += words
            count += len(part)
        return cls(torch.cat(tokens), torch.cat(pairs), instructions)


def read_fits(folder: Path, held_out: int) -> tuple[Pairs, Pairs, dict]:
    """(to learn from, held out, how they were fitted). ValueError in one sentence where the folder has too few parts, or
    parts of different fits."""
    paths = sorted(folder.glob("fits_*.safetensors"))
    if len(paths) <= held_out:
        raise ValueError(f"{folder} has {len(paths)} parts of fitted pairs, of which {held_out} are held out: make more with "
                         "`sda miniature fits`.")
    parts = [read_part(path) for path in paths]
    for path, part in zip(paths, parts):
        if part[3] != parts[0][3]:
            raise ValueError(f"{path} was fitted by other settings than {paths[0].name}: keep one kind in a folder.")
    return Pairs.of(parts[:-held_out]), Pairs.of(parts[-held_out:]), parts[0][3]


class EditorFromFits:
    name = "editor_from_fits"

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.text = load_text_encoder(config.text, device)
        self.pairs, self.held, fitted = read_fits(config.fits, config.held_out)
        self.hierarchy, dim = named_hierarchy(fitted["preset"]), self.pairs.tokens.shape[-1]
        decoder = build_edit_decoder(T5EditDecoderConfig(dim, dim, self.hierarchy.to_json(), config.width, config.heads,
                                                         config.layers))
        self.trainables = nn.ModuleDict({"decoder": decoder}).to(device)
        known = self.pairs.tokens.float()
        self.decoder.set_token_statistics(known.mean((0, 1)), known.std((0, 1)))
        self.frozen = {"text": self.text}
        self.base = fitted["flux"]
        self.identity = {"text": file_hash(config.text), "fits": fitted, "pairs": len(self.pairs.pairs)}
        if config.run.compile:
            compile_blocks(self.decoder.blocks)

    @property
    def decoder(self) -> EditDecoder:
        return self.trainables["decoder"]

    def losses(self, pairs: Pairs, rows: list[int], step: Step):
        source, target = (pairs.tokens[pairs.pairs[rows, side]].float().to(self.device) for side in (0, 1))
        with torch.no_grad():
            words, _ = encode(self.text, token_ids([pairs.instructions[row] for row in rows], self.device))
        return editor_loss(self.decoder, source, target, self.hierarchy.boxes(), self.hierarchy.level_ids(), words,
                           self.config.objective, step)

    def loss(self, step: Step):
        return self.losses(self.pairs, (step.rand() * len(self.pairs.pairs)).long().tolist(), step)

    def scales(self, step: int) -> dict[str, float]:
        return {}

    def validate(self) -> dict[str, float]:
        count = len(self.held.pairs)
        _, parts = self.losses(self.held, list(range(count)), Step(0, 1, 0, "validation", self.device, range(count), count))
        return {k: float(v) for k, v in parts.items()}

    def export(self, step: int) -> None:
        checkpoint.save(self.config.export, self.decoder.state_dict(), kind="edit_decoder", dtype=torch.int8, step=step,
                        config=self.decoder.config.to_json(), hierarchy=list(self.decoder.config.hierarchy),
                        base_sha256=self.base, fitted=True, licence="Apache-2.0")


def run(config: Config) -> bool:
    return launch(EditorFromFits, config)
