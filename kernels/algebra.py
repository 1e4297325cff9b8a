"""Algebra of semantic embeddings: pure functions, embeddings in, a new embedding out."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .embedding import SemanticEmbedding, tidy_masks

_PARALLEL = 1e-4  # sine of an angle below which slerp is a straight line


def blend(
    a: SemanticEmbedding,
    b: SemanticEmbedding,
    t: float,
    mode: str = "lerp",
    levels: Collection[int] | None = None,
) -> SemanticEmbedding:
    """Between a (t = 0) and b (t = 1), token by token; both need the same boxes, levels and masks.

    mode: "lerp" is the straight line; "slerp" turns the direction on the sphere (Shoemake 1985) and moves the length on
        a straight line. Opposite and (nearly) parallel vectors, which have no one arc, take the straight line.
    levels: only tokens of these levels are blended, the others stay a's. Pooled, which speaks for the whole image, is
        blended with level 0. Strengths are blended as factors, exp(log-bias), so that -inf stays meaningful.
    Batches must be equal or one of them 1.
    """
    if mode not in ("lerp", "slerp"):
        raise ValueError(f"There is no blend mode {mode!r}: use 'lerp' or 'slerp'.")
    if not math.isfinite(t):
        raise ValueError("The blend amount must be a finite number: use 0 for the first embedding and 1 for the second.")
    _check_alike(a, b)
    weight = t * of_levels(a, levels).to(a.tokens.dtype)
    move = _lerp if mode == "lerp" else _slerp
    pooled = a.pooled
    if a.pooled is not None and b.pooled is not None and (levels is None or 0 in levels):
        pooled = move(a.pooled, b.pooled, torch.tensor(t))
    tokens = move(a.tokens, b.tokens, weight[:, None])
    return replace(
        a,
        tokens=tokens,
        strengths=_blend_strengths(a.strengths, b.strengths.to(a.strengths.device), weight.float()),
        pooled=_match_batch(pooled, tokens.shape[0]),
        source={"blend": _sources(a, b), "amount": t, "mode": mode, **_origin(a)},
    )


def with_strength(
    e: SemanticEmbedding,
    factor: float,
    levels: Collection[int] | None = None,
    boxes: Tensor | None = None,
) -> SemanticEmbedding:
    """Multiply the attention weight of tokens by `factor`: 1 = unchanged, 0 = off. Adds ln(factor) to the log-bias.

    levels: only these levels. boxes: [N, 4], only tokens that own exactly one of these boxes (cells).
    """
    if not factor >= 0 or math.isinf(factor):
        raise ValueError(f"A strength factor is a finite number from 0 (off) up, not {factor}.")
    chosen = of_levels(e, levels)
    if boxes is not None:
        wanted = boxes.to(e.boxes)
        chosen &= ((e.boxes[:, None] - wanted[None]).abs() < 1e-6).all(-1).any(-1)
    shift = math.log(factor) if factor > 0 else -math.inf
    return replace(e, strengths=torch.where(chosen, e.strengths + shift, e.strengths))


def with_balance(e: SemanticEmbedding, balance: float) -> SemanticEmbedding:
    """Coarse levels against fine ones: -1 only the coarsest there is counts, 0 as it was, 1 only the finest. Between them the
    factors of the levels go from one end to the other in equal steps."""
    if not -1 <= balance <= 1:
        raise ValueError(f"The balance of coarse and fine levels goes from -1 to 1, not to {balance}.")
    levels = sorted(set(e.levels.tolist()))
    if len(levels) == 1 or balance == 0:
        return e
    coarse, fine = min(1.0, 1.0 - balance), min(1.0, 1.0 + balance)
    for rank, level in enumerate(levels):
        e = with_strength(e, coarse + (fine - coarse) * rank / (len(levels) - 1), {level})
    return e


def compose(parts: list[SemanticEmbedding]) -> SemanticEmbedding:
    """Join embeddings into one that is decoded together; tokens keep their boxes and masks.

    Pooled is the first there is.
    """
    if not parts:
        raise ValueError("There is nothing to compose: give at least one embedding.")
    first, batch = parts[0], max(part.batch for part in parts)
    for part in parts:
        _check_width(first, part)
        _check_batch(first, part)
        if part.batch not in (1, batch):
            raise ValueError(f"Embeddings of {part.batch} and {batch} images cannot be joined: use equal batches.")
    pooled = next((part.pooled for part in parts if part.pooled is not None), None)
    device, dtype = first.tokens.device, first.tokens.dtype

    def join(name: str) -> Tensor:
        return torch.cat([getattr(part, name).to(device) for part in parts])

    masks, masked_by = _join_masks(parts, device)
    scheduled = any(part.schedule is not None for part in parts)
    return SemanticEmbedding(
        tokens=torch.cat([part.tokens.to(device, dtype).expand(batch, -1, -1) for part in parts], dim=1),
        boxes=join("boxes"),
        levels=join("levels"),
        strengths=join("strengths"),
        pooled=_match_batch(pooled, batch),
        source={"compose": _sources(*parts), **_origin(*parts)},
        masks=masks,
        masked_by=masked_by,
        schedule=torch.cat([_schedule(part).to(device) for part in parts]) if scheduled else None,
    )


def during(e: SemanticEmbedding, start: float, end: float) -> SemanticEmbedding:
    """`e` seen only in this part of the sampling, shares 0 <= start <= end <= 1, of what its tokens had: where the two parts
    share nothing, a token is not seen at all. The attention obeys it where Masked Attention is."""
    if not 0 <= start <= end <= 1:
        raise ValueError(f"A schedule goes from a start to an end, both in 0..1, not from {start} to {end}.")
    if start == 0 and end == 1:
        return e
    begins, ends = _schedule(e).unbind(-1)
    begins = begins.clamp(min=start)
    return replace(e, schedule=torch.stack([begins, ends.clamp(max=end).maximum(begins)], dim=-1))


def restrict(
    edited: SemanticEmbedding,
    source: SemanticEmbedding,
    mask: Tensor,
    levels: Collection[int] | None = None,
) -> SemanticEmbedding:
    """Let an edit happen only inside a mask.

    A token whose box misses the mask is the source's. A token whose box reaches into the mask moves towards the edited
    one, by the greatest value of the mask in the box. The mean would not do: under a small mask the tokens of the whole
    picture would stay the source's and work against the edit (`benchmarks/kit.md` measures what a mask costs).

    mask: [H, W] floating in 0..1 over the whole image, any size. levels: only these may change at all.
    """
    _check_alike(source, edited)
    if mask.ndim != 2 or not mask.is_floating_point() or not ((mask >= 0) & (mask <= 1)).all():
        raise ValueError(f"The mask must be floating [H, W] in 0..1, not {mask.dtype} {list(mask.shape)}.")
    weight = _reached(source, mask.to(source.boxes)) * of_levels(source, levels)
    tokens = _lerp(source.tokens, edited.tokens, weight.to(source.tokens.dtype)[:, None])
    return replace(
        source,
        tokens=tokens,
        strengths=_blend_strengths(source.strengths, edited.strengths.to(source.strengths.device), weight),
        pooled=_match_batch(source.pooled, tokens.shape[0]),
        source={"restrict": _sources(edited, source), **_origin(source)},
    )


def select(e: SemanticEmbedding, keep: Tensor) -> SemanticEmbedding:
    """Only the tokens where `keep`, bool [T], says so: at least one."""
    masks, masked_by = (None, None) if e.masks is None else tidy_masks(e.masks, e.masked_by[keep])
    return replace(
        e, tokens=e.tokens[:, keep], boxes=e.boxes[keep], levels=e.levels[keep], strengths=e.strengths[keep],
        masks=masks, masked_by=masked_by, schedule=None if e.schedule is None else e.schedule[keep],
    )  # fmt: skip


def of_levels(e: SemanticEmbedding, levels: Collection[int] | None) -> Tensor:
    """bool [T]: tokens of these levels; None means all. ValueError names a level that is not there."""
    if levels is None:
        return torch.ones_like(e.levels, dtype=torch.bool)
    present = set(e.levels.tolist())
    for level in levels:
        if level not in present:
            raise ValueError(f"The embedding has no level {level}: it has {', '.join(map(str, sorted(present)))}.")
    return torch.isin(e.levels, torch.tensor(sorted(levels), device=e.levels.device, dtype=e.levels.dtype))


def _lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return torch.lerp(a, b.to(a), t.to(a))


def _slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    x, y, t = a.float(), b.to(a.device).float(), t.to(a.device).float()
    norm_x, norm_y = x.norm(dim=-1, keepdim=True), y.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    unit_x, unit_y = x / norm_x.clamp_min(tiny), y / norm_y.clamp_min(tiny)
    # Kahan's form: unlike the arc cosine it keeps its accuracy near 0 and pi.
    angle = 2 * torch.atan2((unit_x - unit_y).norm(dim=-1, keepdim=True), (unit_x + unit_y).norm(dim=-1, keepdim=True))
    sine = torch.sin(angle)
    safe = torch.where(sine > _PARALLEL, sine, torch.ones_like(sine))
    arc = (torch.sin((1 - t) * angle) * unit_x + torch.sin(t * angle) * unit_y) / safe * torch.lerp(norm_x, norm_y, t)
    # No arc between (nearly) parallel, opposite or zero vectors; t = 0 and 1 give the ends exactly.
    straight = (sine <= _PARALLEL) | (norm_x * norm_y == 0) | (t == 0) | (t == 1)
    return torch.where(straight, torch.lerp(x, y, t), arc).to(a.dtype)


def _blend_strengths(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    mixed = torch.log(torch.lerp(a.exp(), b.exp(), weight).clamp_min(0))
    return torch.where((a == b) | (weight == 0), a, torch.where(weight == 1, b, mixed))


def _reached(e: SemanticEmbedding, mask: Tensor) -> Tensor:
    """[T]: the greatest value of the mask [H, W] in each token's box, where the token's own mask is not black.

    A pixel does not count if the box covers less than 1e-4 of its side: that is rounding. A smaller box has the pixel
    under its first corner.
    """
    height, width = mask.shape
    seen = [mask]  # for tokens without a mask, then for the tokens of each mask
    if e.masks is not None:
        seen += list(mask * F.interpolate((e.masks > 0).to(mask)[None], mask.shape, mode="nearest")[0])
    rows = [0] * e.token_count if e.masked_by is None else (e.masked_by + 1).tolist()
    edges = e.boxes.cpu().double() * torch.tensor([width, height, width, height], dtype=torch.float64)
    first, end = (edges[:, :2] + 1e-4).floor().long().tolist(), (edges[:, 2:] - 1e-4).ceil().long().tolist()
    areas = (seen[row][min(y, height - 1) : max(y + 1, low), min(x, width - 1) : max(x + 1, right)]
             for row, (x, y), (right, low) in zip(rows, first, end))  # fmt: skip
    return torch.stack([area.max() for area in areas])


def _join_masks(parts: list[SemanticEmbedding], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    tables, rows, start = [], [], 0
    for part in parts:
        if part.masks is None:
            rows.append(torch.full_like(part.levels, -1, device=device))
            continue
        own = part.masked_by.to(device)
        rows.append(torch.where(own < 0, own, own + start))
        tables.append(part.masks.to(device))
        start += len(part.masks)
    return tidy_masks(torch.cat(tables), torch.cat(rows)) if tables else (None, None)


def _schedule(e: SemanticEmbedding) -> Tensor:
    return e.boxes.new_tensor([0.0, 1.0]).expand(e.token_count, 2) if e.schedule is None else e.schedule


def _match_batch(pooled: Tensor | None, batch: int) -> Tensor | None:
    return None if pooled is None else pooled.expand(batch, -1)


def _sources(*parts: SemanticEmbedding) -> list[dict[str, Any]]:
    """The sources of the parts, without those that another part's source holds.

    An edited embedding holds its source's. Blending the two again and again would double the record each time.
    """
    kept: list[dict[str, Any]] = []
    for part in parts:
        if not _holds(kept, part.source):
            kept = [other for other in kept if not _holds(part.source, other)] + [part.source]
    return kept


def _holds(record: Any, source: dict[str, Any]) -> bool:
    """Whether a record holds all of `source`, at any depth."""
    if isinstance(record, dict):
        return source.items() <= record.items() or any(_holds(each, source) for each in record.values())
    return isinstance(record, list) and any(_holds(each, source) for each in record)


def _origin(*parts: SemanticEmbedding) -> dict[str, Any]:
    """The entries of `source` that stay true of a result: what all parts agree on about their adapter."""
    first = parts[0].source
    return {
        key: first[key]
        for key in ("adapter", "pooled_width")
        if key in first and all(part.source.get(key) == first[key] for part in parts)
    }


def _check_width(a: SemanticEmbedding, b: SemanticEmbedding) -> None:
    if a.width != b.width:
        raise ValueError(
            f"Embeddings of width {a.width} and {b.width} belong to different base models: use adapters of the same model."
        )


def _check_batch(a: SemanticEmbedding, b: SemanticEmbedding) -> None:
    if a.batch != b.batch and 1 not in (a.batch, b.batch):
        raise ValueError(f"Embeddings of {a.batch} and {b.batch} images cannot be combined: use equal batches or one image.")


def _check_alike(a: SemanticEmbedding, b: SemanticEmbedding) -> None:
    _check_width(a, b)
    _check_batch(a, b)
    made_by = [e.source.get("adapter") for e in (a, b)]
    if None not in made_by and made_by[0] != made_by[1]:
        raise ValueError(
            f"Embeddings of different adapters ({made_by[0]} and {made_by[1]}) cannot be combined token by token: "
            "build both with the same adapter."
        )
    if a.token_count != b.token_count or not torch.equal(a.levels.cpu(), b.levels.cpu()) or not torch.allclose(
        a.boxes.cpu(), b.boxes.cpu(), atol=1e-6
    ):
        raise ValueError(
            f"Embeddings with different layouts ({a.token_count} and {b.token_count} tokens) cannot be combined: "
            "build both with the same preset."
        )
    if not _same_masks(a, b):
        raise ValueError(
            "Embeddings that are confined to different regions cannot be combined token by token: "
            "combine them first and place the result in its region."
        )


def _same_masks(a: SemanticEmbedding, b: SemanticEmbedding) -> bool:
    if a.masks is None or b.masks is None:
        return a.masks is b.masks
    pairs = torch.stack([a.masked_by.cpu(), b.masked_by.cpu()], dim=1).unique(dim=0).tolist()
    return all(
        one == other == -1 or (min(one, other) >= 0 and torch.equal(a.masks[one].cpu(), b.masks[other].cpu()))
        for one, other in pairs
    )
