"""Visibility: which latent patch sees which token, and the log-bias that says so to the attention.

Computed for the patch grid at hand, whatever its size; nothing here is ever stored at one size. On the CPU in float64,
wherever the boxes are: one layout means one mask on every machine, and not every device has float64.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .area import resample, snap_ends

# Boxes travel through ComfyUI as integers in 1/65536. A cell border such as 1/3 may be half a step off after that, and
# must not make a patch on the other side of the border see the cell; a real overlap is never that thin.
BOX_STEP = 1 / 65536
# Masks travel as bytes, so a mask and what it leaves over may add up to a little more than 1.
MASK_STEP = 1 / 128


def patch_grid(height: int, width: int, patch: int = 2) -> tuple[int, int]:
    """(rows, cols) of the patches of a latent of `height` x `width`: rounded up, as ComfyUI pads to the patch size."""
    if height < 1 or width < 1 or patch < 1:
        raise ValueError(f"A latent of {height}x{width} cannot be cut into patches of {patch}x{patch}.")
    return -(-height // patch), -(-width // patch)


def _overlap(low: Tensor, high: Tensor, other_low: Tensor, other_high: Tensor) -> Tensor:
    """bool [..., N, M]: do the intervals [..., N] and [..., M] share more than a point?"""
    shared = torch.minimum(high.unsqueeze(-1), other_high.unsqueeze(-2))
    shared = shared - torch.maximum(low.unsqueeze(-1), other_low.unsqueeze(-2))
    return shared > BOX_STEP


def visible(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which patch sees which token: bool [P, T] (or [B, P, T]), patches row by row, P = rows * cols.

    `boxes` [T, 4] or [B, T, 4], any float dtype, (x0, y0, x1, y1) in unit coordinates of the grid. A patch sees a token
    if patch and box overlap with positive area, so that a patch which straddles a border sees both cells.
    """
    device, boxes = boxes.device, _checked(boxes)
    rows, cols = grid
    x0, y0, x1, y1 = boxes.unbind(-1)
    edge_x = torch.arange(cols + 1, dtype=boxes.dtype, device=boxes.device) / cols
    edge_y = torch.arange(rows + 1, dtype=boxes.dtype, device=boxes.device) / rows
    in_x = _overlap(edge_x[:-1], edge_x[1:], x0, x1)  # [..., cols, T]
    in_y = _overlap(edge_y[:-1], edge_y[1:], y0, y1)  # [..., rows, T]
    seen = in_y.unsqueeze(-2) & in_x.unsqueeze(-3)
    return rearrange(seen, "... rows cols t -> ... (rows cols) t").to(device)


def region_bias(
    boxes: Tensor,
    strengths: Tensor,
    grid: tuple[int, int],
    text: int,
    references: int = 0,
    mixing: Literal["all", "overlap"] = "all",
    masks: Tensor | None = None,
    masked_by: Tensor | None = None,
) -> Tensor:
    """The additive log-bias of every query of the joint sequence on the first T keys, the region tokens.

    The sequence is `[text-like tokens ; image patches ; reference patches]`; its first T tokens are the region tokens.
    `boxes` [T, 4], `strengths` [T] (log-bias, 0 = as trained, -inf = deleted), `text` = number of text-like tokens, the
    T region tokens among them. Returns float32 [S, T] on the boxes' device, S = text + P + references; with a leading
    batch dimension on boxes or strengths (either or both) [B, S, T].

    Image patches get the strength where they see the token and -inf elsewhere. Plain text and references see every
    token. Region tokens see each other all (`mixing="all"`) or only where their boxes overlap (`"overlap"`).
    A strength of -inf is -inf for every query: exactly the sequence without that token, except that the deleted token
    still has a row of its own, which nobody reads.

    `masks` [M, H, W] in 0..1 over the whole image and `masked_by` [T], the row that confines a token or -1, may both
    have a leading batch dimension. An image patch over which the token's mask has the mean c sees it with log(c) added,
    not at all where c is 0. Tokens with different masks overlap only where their masks do, so that a soft region and
    what surrounds it (m and 1 - m) do not.
    """
    device, boxes = boxes.device, _checked(boxes)
    tokens = boxes.shape[-2]
    if strengths.shape[-1] != tokens or strengths.dim() > 2:
        raise ValueError(f"There are {tokens} boxes but strengths of shape {list(strengths.shape)}; give one each.")
    if text < tokens:
        raise ValueError(f"The text part holds {text} tokens and cannot begin with {tokens} region tokens.")
    if mixing not in ("all", "overlap"):
        raise ValueError(f"Token mixing is 'all' or 'overlap', not {mixing!r}.")

    strengths = strengths.to("cpu", torch.float32)
    patches = visible(boxes, grid)
    lead = boxes.shape[:-2]
    if mixing == "overlap":
        x0, y0, x1, y1 = boxes.unbind(-1)
        among = _overlap(x0, x1, x0, x1) & _overlap(y0, y1, y0, y1)
    else:
        among = patches.new_ones((*lead, tokens, tokens))
    plain = patches.new_ones((*lead, text - tokens, tokens))
    reference = patches.new_ones((*lead, references, tokens))
    seen = torch.cat([among, plain, patches, reference], dim=-2)
    bias = torch.where(seen, strengths.unsqueeze(-2), float("-inf"))
    if masks is not None:
        bias = bias + _mask_bias(masks.cpu(), masked_by.cpu(), grid, text, references, mixing)
    return bias.to(device)


def _mask_bias(
    masks: Tensor, masked_by: Tensor, grid: tuple[int, int], text: int, references: int, mixing: str
) -> Tensor:
    """float32 [S, T] or [B, S, T]: what the masks add to the bias of the boxes."""
    count, tokens = masks.shape[-3], masked_by.shape[-1]
    if masks.dim() != masked_by.dim() + 2 or not ((masked_by >= -1) & (masked_by < count)).all():
        raise ValueError(f"The layout names masks that are not among the {count} given: masks and layout belong together.")
    means = rearrange(snap_ends(resample(masks, *grid)), "... m rows cols -> ... m (rows cols)")
    means = torch.cat([means, torch.ones_like(means[..., :1, :])], dim=-2)  # the last row is of tokens without a mask
    row = masked_by.remainder(count + 1)
    seen = torch.take_along_dim(means, row.unsqueeze(-1), dim=-2)  # [..., T, P]
    bias = F.pad(seen.log().mT.float(), (0, 0, text, references))
    if mixing == "overlap":
        shared = [(means + one.unsqueeze(-2) > 1 + MASK_STEP).any(-1) for one in means.unbind(-2)]
        among = torch.stack(shared, dim=-2) | torch.eye(count + 1, dtype=torch.bool, device=means.device)
        among = torch.take_along_dim(among, row.unsqueeze(-1), dim=-2)
        among = torch.take_along_dim(among, row.unsqueeze(-2), dim=-1)
        bias[..., :tokens, :] = torch.zeros_like(among, dtype=bias.dtype).masked_fill(~among, -torch.inf)
    return bias


def _checked(boxes: Tensor) -> Tensor:
    if boxes.dim() not in (2, 3) or boxes.shape[-1] != 4:
        raise ValueError(f"Boxes have the shape [tokens, 4] or [batch, tokens, 4], not {list(boxes.shape)}.")
    return boxes.to("cpu", torch.float64)
