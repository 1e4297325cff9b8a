"""The layout of region tokens as one integer tensor, the form in which it passes through core's conditioning.

Core casts floating conditioning to the model's dtype (bfloat16 would move a box border by a patch) but leaves integers
alone, so a layout travels as int32 [B, T, 6]: x0, y0, x1, y1, level, strength. Boxes and strengths are fixed point in
1/65536; a strength of -inf is the smallest int32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.embedding import SemanticEmbedding

UNIT = 65536
OFF = -(2**31)
_LIMIT = 2**31 - 1


def encode(embedding: SemanticEmbedding) -> Tensor:
    """int32 [1, T, 6] on the CPU; a finite strength keeps 1/131072 and is held within +-32767."""
    strengths = embedding.strengths.double().cpu()
    fixed = (strengths * UNIT).clamp(-_LIMIT, _LIMIT).round()
    fixed = torch.where(strengths == -torch.inf, float(OFF), fixed)
    boxes = (embedding.boxes.double().cpu() * UNIT).round()
    columns = [*boxes.unbind(-1), embedding.levels.double().cpu(), fixed]
    return torch.stack(columns, dim=-1).to(torch.int32)[None]


def decode(layout: Tensor) -> tuple[Tensor, Tensor]:
    """(boxes float32 [T, 4] or [B, T, 4], log-bias strengths float32 [T] or [B, T]) of a layout [B, T, 6].

    Without the batch axis where all entries are the same, which lets the attention share its bias.
    """
    if layout.shape[0] == 1 or bool((layout == layout[:1]).all()):
        layout = layout[0]
    fixed = layout[..., 5]
    strengths = torch.where(fixed == OFF, -torch.inf, fixed.float() / UNIT)
    return layout[..., :4].float() / UNIT, strengths
