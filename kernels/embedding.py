"""The semantic embedding: vectors in the space of Flux's text encoder, each owning a box of the image."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .area import resample, snap_ends
from .hierarchy import MAX_LEVELS, Hierarchy

MASK_SIDE = 256  # masks are kept at one size whatever the aspect: two pixels to a patch at 2048x2048


@dataclass(frozen=True, eq=False)
class SemanticEmbedding:
    """The one type that every feature speaks: an encoded image, an edited one, a blend, a regional prompt.

    tokens:    [B, T, D] floating, finite; D is the width of the text space (4096 for FLUX.1).
    boxes:     [T, 4] float32, (x0, y0, x1, y1) in units of the image, 0 <= x0 < x1 <= 1 and the same in y.
    levels:    [T] int64 in 0..63, 0 is the coarsest.
    strengths: [T] float32, additive log-bias on the attention logits: 0 = as trained, -inf = off.
    pooled:    [B, P] floating or None, the vector that Flux takes beside the sequence.
    source:    where it came from, JSON values only (adapter, pooled_width, edits, ...).
    masks:     [M, 256, 256] float32 in 0..1, soft regions over the whole image, or None where no token has one.
    masked_by: [T] int64, the row of `masks` that a token is confined to beside its box, -1 = none; None iff masks is.
    schedule:  [T, 2] float32, the part of the sampling in which a token is seen, from start to end as shares with
               0 <= start <= end <= 1, or None where all are always seen.
    Raises ValueError in one sentence if any of this does not hold.
    """

    tokens: Tensor
    boxes: Tensor
    levels: Tensor
    strengths: Tensor
    pooled: Tensor | None = None
    source: dict[str, Any] = field(default_factory=dict)
    masks: Tensor | None = None
    masked_by: Tensor | None = None
    schedule: Tensor | None = None

    def __post_init__(self) -> None:
        tokens, count = self.tokens, self.tokens.shape[-2] if self.tokens.ndim == 3 else -1
        if tokens.ndim != 3 or not tokens.is_floating_point() or 0 in tokens.shape:
            raise ValueError(f"The tokens of an embedding must be floating [B, T, D], not {_describe(tokens)}.")
        for name, shape, dtype in (
            ("boxes", (count, 4), torch.float32),
            ("levels", (count,), torch.int64),
            ("strengths", (count,), torch.float32),
        ):
            value = getattr(self, name)
            if tuple(value.shape) != shape or value.dtype != dtype:
                raise ValueError(f"The {name} of this embedding must be {dtype} {list(shape)}, not {_describe(value)}.")
        if not torch.isfinite(tokens).all():
            raise ValueError("The embedding has NaN or infinite tokens: encode the image again or use another checkpoint.")
        x0, y0, x1, y1 = self.boxes.unbind(-1)
        if not ((x0 >= 0) & (y0 >= 0) & (x0 < x1) & (y0 < y1) & (x1 <= 1) & (y1 <= 1)).all():
            raise ValueError("A box of the embedding is empty or outside the image: boxes are x0 < x1 and y0 < y1 in 0..1.")
        if (self.levels < 0).any():
            raise ValueError("A level of the embedding is negative: levels count from 0, the coarsest.")
        if (self.levels >= MAX_LEVELS).any():
            raise ValueError(f"A level of the embedding is {int(self.levels.max())}: levels count from 0, below {MAX_LEVELS}.")
        if not (self.strengths < torch.inf).all():
            raise ValueError("A strength of the embedding is NaN or +inf: use a finite log-bias, or -inf to switch a token off.")
        if self.pooled is not None:
            shape = self.pooled.shape
            if len(shape) != 2 or shape[0] != tokens.shape[0] or not shape[1] or not self.pooled.is_floating_point():
                raise ValueError(
                    f"The pooled vector must be floating [{tokens.shape[0]}, P] like the tokens' batch, not {_describe(self.pooled)}."
                )
            if not torch.isfinite(self.pooled).all():
                raise ValueError("The embedding has a NaN or infinite pooled vector: encode the image again.")
        if self.masks is not None or self.masked_by is not None:
            self._check_masks()
        if self.schedule is not None:
            self._check_schedule()

    def _check_masks(self) -> None:
        masks, rows = self.masks, self.masked_by
        if masks is None or rows is None:
            raise ValueError("An embedding has either both masks and masked_by or neither: give the other one too.")
        side = (MASK_SIDE, MASK_SIDE)
        if masks.ndim != 3 or masks.shape[1:] != side or not len(masks) or masks.dtype != torch.float32:
            raise ValueError(f"The masks of this embedding must be torch.float32 [M, {side[0]}, {side[1]}], not {_describe(masks)}.")
        if not ((masks >= 0) & (masks <= 1)).all():
            raise ValueError("A mask of the embedding is NaN or outside 0..1: make it with fit_mask.")
        if tuple(rows.shape) != (self.token_count,) or rows.dtype != torch.int64:
            raise ValueError(f"masked_by of this embedding must be torch.int64 [{self.token_count}], not {_describe(rows)}.")
        if not ((rows >= -1) & (rows < len(masks))).all():
            raise ValueError(f"masked_by must name one of {len(masks)} masks, counted from 0, or be -1 for none.")

    def _check_schedule(self) -> None:
        shape, dtype = tuple(self.schedule.shape), self.schedule.dtype
        if shape != (self.token_count, 2) or dtype != torch.float32:
            raise ValueError(
                f"The schedule of this embedding must be torch.float32 [{self.token_count}, 2], not {_describe(self.schedule)}."
            )
        start, end = self.schedule.unbind(-1)
        if not ((start >= 0) & (start <= end) & (end <= 1)).all():
            raise ValueError("The schedule of the embedding has a start after its end, or outside 0..1: both are shares of the sampling.")

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def token_count(self) -> int:
        return self.tokens.shape[1]

    @property
    def width(self) -> int:
        return self.tokens.shape[2]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SemanticEmbedding:
        """The same embedding on a device; `dtype` is that of tokens and pooled only, the layout keeps its own."""
        return replace(
            self,
            tokens=self.tokens.to(device=device, dtype=dtype),
            boxes=self.boxes.to(device=device),
            levels=self.levels.to(device=device),
            strengths=self.strengths.to(device=device),
            pooled=None if self.pooled is None else self.pooled.to(device=device, dtype=dtype),
            masks=None if self.masks is None else self.masks.to(device=device),
            masked_by=None if self.masked_by is None else self.masked_by.to(device=device),
            schedule=None if self.schedule is None else self.schedule.to(device=device),
        )

    def hierarchy(self) -> Hierarchy:
        """The hierarchy that these boxes spell, token for token.

        ValueError for a free layout (composed or regional).
        """
        found = []
        for level in torch.unique_consecutive(self.levels).tolist():
            boxes = self.boxes[self.levels == level]
            rows, cols = boxes[:, 1].unique().numel(), boxes[:, 0].unique().numel()
            found.append((rows, cols, max(1, boxes.shape[0] // (rows * cols))))
        if len({grid[:2] for grid in found}) == len(found):
            candidate = Hierarchy.from_json(found)
            expected = candidate.boxes().to(self.boxes)
            if expected.shape == self.boxes.shape and torch.allclose(expected, self.boxes, atol=1e-6):
                return candidate
        raise ValueError("This embedding is not a plain hierarchy (it was composed or placed): use an encoded image instead.")


def from_hierarchy(
    tokens: Tensor, hierarchy: Hierarchy, pooled: Tensor | None = None, source: dict[str, Any] | None = None
) -> SemanticEmbedding:
    """An embedding as an adapter gives it: tokens [B, T, D] in the hierarchy's order, every strength 0 (as trained)."""
    return SemanticEmbedding(
        tokens=tokens,
        boxes=hierarchy.boxes().to(tokens.device),
        levels=hierarchy.level_ids().to(tokens.device),
        strengths=torch.zeros(hierarchy.token_count, device=tokens.device),
        pooled=pooled,
        source=dict(source or {}),
    )


def fit_mask(mask: Tensor) -> Tensor:
    """A MASK of any size and float dtype, [H, W] or [1, H, W], as float32 [256, 256] in 0..1 (area means, clamped).

    ValueError for NaN and for a batch of masks: an embedding of many images has one layout for all of them.
    """
    if mask.ndim == 3 and mask.shape[0] > 1:
        raise ValueError(f"There are {mask.shape[0]} masks and an embedding takes one for all its images: pick one of them.")
    if mask.ndim not in (2, 3) or 0 in mask.shape:
        raise ValueError(f"A mask is [H, W] or [1, H, W], not {_describe(mask)}.")
    if mask.isnan().any():
        raise ValueError("The mask has NaN values: make it again, white where the region is and black elsewhere.")
    pixels = mask.reshape(mask.shape[-2:]).float().clamp(0, 1)
    return snap_ends(resample(pixels, MASK_SIDE, MASK_SIDE)).float()


def tidy_masks(masks: Tensor, masked_by: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The fields `masks` and `masked_by` of an embedding, without unused and repeated masks; None if none is left."""
    kept: list[Tensor] = []
    places = torch.full((len(masks) + 1,), -1, device=masked_by.device)  # the last one is read for -1
    for row in masked_by.unique().tolist():
        if row < 0:
            continue
        place = next((i for i, other in enumerate(kept) if torch.equal(other, masks[row])), len(kept))
        if place == len(kept):
            kept.append(masks[row])
        places[row] = place
    return (torch.stack(kept), places[masked_by]) if kept else (None, None)


def _describe(value: Tensor) -> str:
    return f"{value.dtype} {list(value.shape)}"
