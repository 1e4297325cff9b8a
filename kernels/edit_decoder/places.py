"""Who a token is and where it sits, as a vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..hierarchy import Hierarchy
from ..rope import rotary_angles


class TokenPlaces(nn.Module):
    """Who a token is: a learned vector per row of the hierarchy table, plus its box and level along continuous axes."""

    AXIS = 16  # channels per axis: sines and cosines at 8 frequencies

    def __init__(self, table: Hierarchy, width: int):
        super().__init__()
        self.table = table
        self.rows = nn.Parameter(torch.randn(table.token_count, width) * 0.02)
        self.box = nn.Linear(7 * self.AXIS, width)

    def index(self, boxes: Tensor, levels: Tensor) -> Tensor:
        """Rows of the table, [T] int64 on the CPU, of tokens given by boxes [T, 4] and levels [T].

        A token's slot is the number of tokens before it with the same box and level.
        """
        boxes, levels = boxes.float().cpu(), levels.cpu()
        near = 1e-3  # far above the rounding of boxes, far below any cell
        same_cell = ((boxes[:, None] - boxes[None]).abs() < near).all(-1) & (levels[:, None] == levels[None])
        slots = same_cell.tril(-1).sum(-1)
        match = ((boxes[:, None] - self.table.boxes()[None]).abs() < near).all(-1)
        match &= (levels[:, None] == self.table.level_ids()[None]) & (slots[:, None] == self.table.slots()[None])
        found = match.any(-1)
        if not found.all():
            i = int((~found).nonzero()[0])
            left, top, right, bottom = (f"{value:.3g}" for value in (100 * boxes[i]).tolist())
            raise ValueError(
                f"This edit decoder knows no cell from {left}% to {right}% across and {top}% to {bottom}% down on level "
                f"{int(levels[i])}: give it an embedding as its own adapter encodes it, before it is composed, placed or given regions."
            )
        return match.long().argmax(-1)

    def forward(self, boxes: Tensor, levels: Tensor) -> Tensor:
        """[T, width]."""
        index = self.index(boxes, levels)
        x0, y0, x1, y1 = (self.table.boxes()[index] * 32).unbind(-1)  # the image is 32 units wide: as many as its patches
        level = self.table.level_ids()[index].float()
        # Centre and level are the axes of the rotary positions; the corners say how far the box reaches.
        axes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, level, x0, y0, x1, y1], dim=-1)
        angles = rotary_angles(axes, (self.AXIS,) * 7)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.rows)
        return self.rows[index.to(self.rows.device)] + self.box(waves)
