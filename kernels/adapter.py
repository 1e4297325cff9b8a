"""The adapter: a QFormer that turns patch features into a semantic embedding in Flux's text space.

Learned queries, one per token of the full hierarchy; in every layer self-attention among the active queries,
cross-attention to the fused patch features, feed-forward (BLIP-2's Q-Former, arXiv 2301.12597, with pre-norm and
cross-attention in every layer). Rotary positions (x, y, level) on queries and on patches, RMS norm on queries and keys.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Len
from einops import rearrange
from torch import Tensor, nn

from . import checkpoint, schema, weights
from .hierarchy import Hierarchy
from .rope import axis_dims, box_positions, patch_positions, rotary_angles, rotate
from .vision.fusion import Fusion
from .vision.towers import TowerConfig


@dataclass(frozen=True)
class AdapterConfig:
    """hierarchy: the full query table as ((rows, cols, tokens), ...).
    out_dim: width of the text space (4096 for FLUX.1).
    pooled_dim: width of the pooled vector (768 for FLUX.1) or None for an adapter without a pooled head."""

    __pydantic_config__ = schema.CLOSED

    hierarchy: schema.Levels
    towers: Annotated[tuple[TowerConfig, ...], Len(1, 16)]
    width: schema.Width = 1024
    heads: schema.Heads = 16
    layers: schema.Layers = 12
    out_dim: schema.Width = 4096
    pooled_dim: schema.Width | None = None

    def __post_init__(self):
        object.__setattr__(self, "hierarchy", tuple(tuple(level) for level in self.hierarchy))
        object.__setattr__(self, "towers", tuple(self.towers))
        if self.width % self.heads:
            raise ValueError(f"An adapter of width {self.width} cannot have {self.heads} heads; use a divisor of the width.")
        axis_dims(self.width // self.heads)
        Hierarchy.from_json(self.hierarchy)

    def to_json(self) -> dict:
        return asdict(self) | {
            "hierarchy": [list(level) for level in self.hierarchy],
            "towers": [tower.to_json() for tower in self.towers],
        }

    @classmethod
    def from_json(cls, record: dict) -> AdapterConfig:
        config = schema.parse(cls, record, "The adapter record")
        for tower in config.towers:
            tower.check_architecture()
        return config


class _Attention(nn.Module):
    """Multi-head attention of queries [B, T, W] to memory [B, N, W], both rotated by their angles."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.q_scale = nn.Parameter(torch.ones(width // heads))
        self.k_scale = nn.Parameter(torch.ones(width // heads))

    def forward(self, x: Tensor, memory: Tensor, x_angles: Tensor, memory_angles: Tensor) -> Tensor:
        q = rearrange(self.q(x), "b t (h d) -> b h t d", h=self.heads)
        k, v = rearrange(self.kv(memory), "b n (kv h d) -> kv b h n d", kv=2, h=self.heads)
        q, k = self._place(q, self.q_scale, x_angles), self._place(k, self.k_scale, memory_angles)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(attended, "b h t d -> b t (h d)"))

    @staticmethod
    def _place(x: Tensor, scale: Tensor, angles: Tensor) -> Tensor:
        """RMS norm, then rotation, both in float32 whatever the weights' dtype or autocast's."""
        return rotate(F.rms_norm(x.float(), scale.shape, scale.float(), 1e-6), angles).to(x.dtype)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = _Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = _Attention(width, heads)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, patches: Tensor, angles: Tensor, patch_angles: Tensor) -> Tensor:
        h = self.self_norm(x)
        x = x + self.self_attention(h, h, angles, angles)
        x = x + self.cross_attention(self.cross_norm(x), patches, angles, patch_angles)
        return x + self.mlp(x)


class Adapter(nn.Module):
    """Patch features -> tokens in the text space, and the pooled vector where there is a head for it."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        self.table = Hierarchy.from_json(config.hierarchy)
        self.fusion = Fusion(config.towers, config.width)
        self.patch_norm = nn.LayerNorm(config.width)
        self.queries = nn.Parameter(torch.randn(self.table.token_count, config.width))
        self.layers = nn.ModuleList(_Layer(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.out_dim)
        self.text_norm = nn.LayerNorm(config.out_dim)
        self.register_buffer("text_mean", torch.zeros(config.out_dim))
        self.register_buffer("text_std", torch.ones(config.out_dim))
        self.pooled_head = None
        if config.pooled_dim is not None:
            self.pooled_head = nn.Sequential(
                nn.Linear(config.width, config.width), nn.GELU(), nn.Linear(config.width, config.pooled_dim)
            )

    def set_text_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation per channel, [out_dim] each, of the text encoder's outputs over real prompts.

        The output starts out, and is held by a norm, at these statistics: a frozen Flux has never seen anything else.
        """
        if mean.shape != self.text_mean.shape or std.shape != self.text_std.shape or not (std > 0).all():
            raise ValueError(f"Text statistics need [{self.config.out_dim}] means and as many positive deviations.")
        self.text_mean.copy_(mean)
        self.text_std.copy_(std)

    def forward(self, features: dict[str, Tensor], hierarchy: Hierarchy | None = None) -> tuple[Tensor, Tensor | None]:
        """features: tower id -> [B, N, C] patch features; hierarchy: the active part of the table, None for all of it.

        Returns (tokens [B, T, out_dim] float32, pooled [B, pooled_dim] float32 or None). Queries outside the hierarchy
        are omitted altogether, also from self-attention: a token's value depends on which others are active, and
        training drops levels at random so that every preset works (Matryoshka queries, arXiv 2405.19315).
        ValueError where the table does not contain the hierarchy or features do not fit.
        """
        index = (hierarchy or self.table).index_in(self.table)
        boxes, levels = self.table.boxes()[index], self.table.level_ids()[index]
        device = self.queries.device
        dims = axis_dims(self.config.width // self.config.heads)
        grid = self.fusion.grid
        angles = rotary_angles(box_positions(boxes, levels, grid).to(device), dims)
        patch_angles = rotary_angles(patch_positions(grid, len(self.config.hierarchy), device), dims)

        patches = self.patch_norm(self.fusion(features))
        x = self.queries[index.to(device)].expand(patches.shape[0], -1, -1)
        for layer in self.layers:
            x = layer(x, patches, angles, patch_angles)
        x = self.norm(x)
        normed = self.text_norm(self.head(x)).float()
        tokens = normed * self.text_std.float() + self.text_mean.float()
        return tokens, self._pooled(x, levels.to(device))

    def _pooled(self, x: Tensor, levels: Tensor) -> Tensor | None:
        if self.pooled_head is None:
            return None
        coarsest = x[:, levels == levels.min()]
        return self.pooled_head(coarsest.mean(dim=1)).float()


def read_adapter(path: str | os.PathLike) -> tuple[Adapter, dict[str, Any]]:
    """(adapter in float32 on the CPU, record) of a file.

    ValueError in one sentence where there is none or it does not fit.
    """
    tensors, record = checkpoint.load(path, "adapter")
    config = AdapterConfig.from_json(record["config"])
    levels, width = record.get("hierarchy"), record.get("widths", {}).get("text")
    if levels not in (None, config.to_json()["hierarchy"]) or width not in (None, config.out_dim):
        raise ValueError(f"{path} says two things of its hierarchy or its text width: export the file again.")
    return weights.build(lambda: Adapter(config), tensors, path), record


def token_similarity(tokens: Tensor) -> Tensor:
    """Mean squared cosine over all pairs of different tokens of an image: the similarity penalty, a scalar in [0, 1].

    tokens [B, T, D]; computed in float32; 0 for a single token.
    """
    count = tokens.shape[1]
    if count < 2:
        return tokens.new_zeros((), dtype=torch.float32)
    unit = F.normalize(tokens.float(), dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    off_diagonal = ~torch.eye(count, dtype=torch.bool, device=tokens.device)
    return cosine[:, off_diagonal].square().mean()
