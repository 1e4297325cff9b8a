"""Pictures of an embedding: its boxes over an image, tinted by a measure, and what each patch sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .algebra import of_levels
from .embedding import SemanticEmbedding
from .visibility import region_bias

MEASURES = ("strength", "token norm", "change")
GROUND = 512  # side of the grey ground that stands for an absent image
_LESS, _MORE = (0.0, 0.3, 1.0), (1.0, 0.5, 0.0)  # blue and orange, which every eye tells apart
_OPACITY = 0.7
_DARK, _LIGHT = 0.1, 1.0  # every line is light between dark edges, to be seen on any picture


def measure(e: SemanticEmbedding, name: str, compare: SemanticEmbedding | None = None) -> Tensor:
    """[B, T] float32 in -1..1: how far each token is from the ordinary, which is 0.

    "strength": its factor less 1, so off is -1, as trained 0, double or more 1.
    "token norm": its length over the median of its image's tokens, less 1.
    "change": its distance from the token of `compare` over that one's length, 0..1.
    ValueError if `compare` is missing or laid out otherwise.
    """
    if name == "strength":
        return (e.strengths.exp() - 1).clamp(-1, 1).expand(e.batch, -1)
    if name == "token norm":
        norms = e.tokens.float().norm(dim=-1)
        return _ratio(norms, norms.median(dim=1, keepdim=True).values) - 1
    if name != "change":
        raise ValueError(f"There is no measure {name!r}: use one of {', '.join(MEASURES)}.")
    if compare is None:
        raise ValueError("The change is measured against a second embedding: connect one to compare.")
    alike = e.tokens.shape[1:] == compare.tokens.shape[1:] and torch.allclose(e.boxes, compare.boxes.to(e.boxes), atol=1e-6)
    if not alike or (e.batch != compare.batch and 1 not in (e.batch, compare.batch)):
        raise ValueError("The embeddings to compare have different layouts or batches: compare one with an edit of itself.")
    before = compare.tokens.to(e.tokens.device).float()
    return _ratio((e.tokens.float() - before).norm(dim=-1), before.norm(dim=-1)).clamp(max=1)


def draw(e: SemanticEmbedding, values: Tensor, image: Tensor | None = None) -> Tensor:
    """The picture [N, H, W, 3] float32 in 0..1: the image under the tint of `values` and the lines of boxes and masks.

    values: [B, T] in -1..1, blue below 0 and orange above, stronger the further away; each place has the mean of the
        finest level that covers it. Or a map [B, h, w] in 0..1 of any size, which tints its own places. Coarser levels
        have thicker lines; of a mask the half-way line is drawn.
    image: IMAGE [N, H, W, 3 or 4] of any size, None is a grey ground of 512 x 512. One that is smaller both ways is
        enlarged by a whole factor, so that the lines do not hide it. A batch of one goes with any batch.
    """
    if image is None:
        image = torch.full((1, GROUND, GROUND, 3), 0.5)
    factor = max(1, -(-GROUND // max(image.shape[1:3])))
    image = image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    batch = max(len(image), len(values))
    if len(image) not in (1, batch) or len(values) not in (1, batch):
        tints = "embeddings" if values.dim() == 2 else "maps"
        raise ValueError(f"There are {len(image)} images and {len(values)} {tints}: use equal numbers, or one of either.")
    height, width = image.shape[1:3]
    masks = _masks(e, height, width, image.device)
    values = values.to(image.device)
    tint = (spread(e, values, height, width) if values.dim() == 2 else _fitted(values, height, width))[..., None]
    colour = torch.where(tint > 0, tint.new_tensor(_MORE), tint.new_tensor(_LESS))
    picture = over_white(image.float()).clamp(0, 1).expand(batch, -1, -1, -1)
    picture = torch.lerp(picture, colour.expand_as(picture), (_OPACITY * tint.abs()).expand_as(picture))
    _lines(picture, e, masks)
    return picture


def over_white(image: Tensor) -> Tensor:
    """IMAGE [..., 3 or 4] in 0..1 -> [..., 3], laid over white as in training."""
    if image.shape[-1] < 4:
        return image
    return torch.lerp(torch.ones_like(image[..., :3]), image[..., :3], image[..., 3:4].clamp(0, 1))


def seen(e: SemanticEmbedding, grid: tuple[int, int], level: int | None = None, token: int | None = None) -> Tensor:
    """[rows, cols] float32 in 0..1: the weight that each patch gives the chosen tokens, the mean of 1 (or 0) for each.

    The weight is exp of the bias that the attention gets, at most 1. level: only its tokens; token: only this one of
    them, counted from 0. ValueError for a level or a token that is not there.
    """
    chosen = of_levels(e, None if level is None else [level]).nonzero()[:, 0]
    if token is not None:
        if not 0 <= token < len(chosen):
            where = "the embedding" if level is None else f"level {level}"
            raise ValueError(f"There is no token {token}: {where} has {len(chosen)}, counted from 0.")
        chosen = chosen[token : token + 1]
    bias = region_bias(e.boxes, e.strengths, grid, text=e.token_count, masks=e.masks, masked_by=e.masked_by)
    weight = bias[e.token_count :, chosen].exp().clamp(max=1)
    return weight.mean(dim=1).reshape(grid)


def spread(e: SemanticEmbedding, values: Tensor, height: int, width: int) -> Tensor:
    """[B, T] -> [B, height, width]: the mean value of the finest level that covers a cell, 0 where none does."""
    masks = _masks(e, height, width, values.device)
    tint = values.new_zeros(len(values), height, width)
    confined = torch.full_like(e.levels, -1) if e.masked_by is None else e.masked_by
    keys = torch.cat([e.levels[:, None], confined[:, None], e.boxes], dim=1).cpu()
    cells, cell_of = keys.unique(dim=0, return_inverse=True)
    for level in cells[:, 0].unique():
        total, weight = torch.zeros_like(tint), tint.new_zeros(height, width)
        for index in (cells[:, 0] == level).nonzero()[:, 0].tolist():
            _, row, x0, y0, x1, y1 = cells[index].tolist()
            down, across = _pixels(y0, y1, height), _pixels(x0, x1, width)
            cover = weight.new_ones(()) if row < 0 else masks[int(row), down, across]
            total[:, down, across] += values[:, cell_of == index].mean(dim=1)[:, None, None] * cover
            weight[down, across] += cover
        tiny = torch.finfo(torch.float32).tiny
        tint = torch.lerp(tint, total / weight.clamp_min(tiny), weight.clamp(max=1).expand_as(tint))
    return tint


def _fitted(tint: Tensor, height: int, width: int) -> Tensor:
    """A map [B, h, w] as [B, height, width] in 0..1; what is no number is 0."""
    tint = F.interpolate(tint.float().nan_to_num(0)[:, None], (height, width), mode="bilinear", antialias=True)[:, 0]
    return tint.clamp(0, 1)


def _ratio(length: Tensor, ordinary: Tensor) -> Tensor:
    """0..2, where 1 is ordinary; nothing over nothing is 0."""
    return (length / ordinary.clamp_min(torch.finfo(torch.float32).tiny)).clamp(0, 2)


def _masks(e: SemanticEmbedding, height: int, width: int, device: torch.device) -> Tensor | None:
    """[M, height, width], or None where there are none."""
    if e.masks is None:
        return None
    return F.interpolate(e.masks[None].to(device), (height, width), mode="bilinear", antialias=True)[0]


def _pixels(low: float, high: float, size: int) -> slice:
    """At least one pixel, whatever the size."""
    start = min(round(low * size), size - 1)
    return slice(start, max(round(high * size), start + 1))


def _lines(picture: Tensor, e: SemanticEmbedding, masks: Tensor | None) -> None:
    """Draw into `picture`: boxes from fine to coarse, so that the coarse ones lie on top, then the masks."""
    unit = max(1, min(picture.shape[1:3]) // GROUND)
    for rank, level in enumerate(reversed(e.levels.unique().tolist())):
        boxes = e.boxes[e.levels == level].unique(dim=0).tolist()
        for thickness, tone in (((rank + 3) * unit, _DARK), ((rank + 1) * unit, _LIGHT)):
            for box in boxes:
                _frame(picture, box, thickness, tone)
    for mask in () if masks is None else masks:
        inside = (mask > 0.5).float()[None]
        for reach, tone in ((2 * unit, _DARK), (unit, _LIGHT)):
            outline = F.max_pool2d(inside, 2 * reach + 1, stride=1, padding=reach) > inside
            picture[:, outline[0]] = tone


def _frame(picture: Tensor, box: list[float], thickness: int, tone: float) -> None:
    """The outline of a unit box, centred on its edges and moved inside where they are the picture's."""
    sizes = (picture.shape[2], picture.shape[1]) * 2
    x0, y0, x1, y1 = (max(0, min(round(a * n) - thickness // 2, n - thickness)) for a, n in zip(box, sizes))
    for x in (x0, x1):
        picture[:, y0 : y1 + thickness, x : x + thickness] = tone
    for y in (y0, y1):
        picture[:, y : y + thickness, x0 : x1 + thickness] = tone
