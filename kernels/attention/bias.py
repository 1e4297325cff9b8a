"""What one forward knows about its region tokens, prepared once and used by every block and every route."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Weight of a key that a query does not see, as a log-bias: exp(-1e4) is 0 in every dtype, 1e4 fits into float16, and
# unlike -inf no kernel turns it into NaN.
FLOOR = -1e4
# Shift of a query that sees no region token at all: its share of the merged softmax is exp(-1e9) = 0.
UNSEEN = -1e9


class Group(NamedTuple):
    """Queries that see the same region tokens. `columns` is None where they see all of them."""

    rows: Tensor
    columns: Tensor | None


class Regions:
    """The log-bias of all S queries on the first T keys (`visibility.region_bias`), read once.

    `bias` float32 [S, T] or [B, S, T]: 0 = seen as trained, -inf = not seen, anything finite = a strength. It is data,
    not a parameter: no gradient flows into it. Preparing reads it back from the device, so prepare once per latent size
    and layout (at most once per forward), not once per block.

    trivial: every query sees every token at strength 0, so the attention is the plain one.
    hard:    the bias holds nothing but 0 and -inf, so a query's attention is a plain one over fewer keys.
    """

    def __init__(self, bias: Tensor) -> None:
        if bias.dim() not in (2, 3):
            raise ValueError(f"A region bias has the shape [S, T] or [B, S, T], not {list(bias.shape)}.")
        if bias.requires_grad:
            raise ValueError("A region bias carries no gradient; detach it.")
        self.bias = (bias if bias.dim() == 3 else bias.unsqueeze(0)).to(torch.float32)
        self.batch, self.length, self.tokens = self.bias.shape
        if self.length <= self.tokens:
            raise ValueError(f"{self.tokens} region tokens need a sequence longer than {self.length}.")
        if bool((self.bias.isnan() | self.bias.isposinf()).any()):
            raise ValueError("A region bias holds NaN or +inf; strengths are finite numbers or -inf.")
        zero = self.bias == 0
        self.trivial = bool(zero.all())
        self.hard = bool((zero | self.bias.isneginf()).all())
        self._relative: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._groups: list[list[Group]] | None = None
        self._first: dict[int, Regions] = {}

    def first(self, rows: int) -> Regions:
        """The regions of a batch that has only so many of its first entries left."""
        if self.batch == 1 or self.batch <= rows:
            return self
        if rows not in self._first:
            self._first[rows] = Regions(self.bias[:rows])
        return self._first[rows]

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """ValueError unless q [B, H, S, d] fits the bias and k, v [B, H, L, d] begin with the region tokens."""
        fits = q.dim() == k.dim() == 4 and k.shape == v.shape and q[:, :, 0].shape == k[:, :, 0].shape
        if not fits or k.shape[2] <= self.tokens:
            raise ValueError(
                f"Masked attention takes q [B, H, S, d] and k, v [B, H, L, d] with L above {self.tokens}, not"
                f" {list(q.shape)}, {list(k.shape)}, {list(v.shape)}."
            )
        if q.shape[2] != self.length or self.batch not in (1, q.shape[0]):
            raise ValueError(
                f"The region bias is for {self.length} tokens and a batch of {self.batch}, but q has {q.shape[2]}"
                f" tokens and a batch of {q.shape[0]}; prepare the regions for this latent."
            )

    def floored(self) -> Tensor:
        """The bias as float32 [B or 1, 1, S, T] with FLOOR for -inf."""
        return self.bias.clamp(min=FLOOR).unsqueeze(1)

    def relative(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The bias split into a part per key and a shift per query: bias = part + shift.

        part [B or 1, 1, S, T] in `dtype`, between FLOOR and 0 with 0 for the strongest token of the query; shift
        [B or 1, 1, S] in at least float32. So one strength for all tokens is exact in any dtype and of any size, and a
        query that sees nothing has an ordinary finite row (all 0) and the shift UNSEEN.
        """
        if dtype not in self._relative:
            bias = self.bias.to(torch.promote_types(dtype, torch.float32))
            shift = bias.amax(dim=-1)
            nothing = shift.isneginf()
            part = (bias - shift.unsqueeze(-1)).masked_fill(nothing.unsqueeze(-1), 0.0).clamp(min=FLOOR)
            # Efficient attention on CUDA wants aligned rows of the bias, so they start at multiples of 16 keys.
            padded = part.new_zeros((self.batch, 1, self.length, -(-self.tokens // 16) * 16), dtype=dtype)
            padded[..., : self.tokens] = part.unsqueeze(1)
            shift = shift.clamp(min=UNSEEN).unsqueeze(1)
            self._relative[dtype] = (padded[..., : self.tokens], shift)
        return self._relative[dtype]

    def groups(self) -> list[list[Group]]:
        """The queries of every batch entry (one list if the bias is not batched), by equal rows of visibility.

        By rows, not by cells: patches that straddle a border, text and references form groups of their own.
        """
        if self._groups is None:
            self._groups = [_group(~entry.isneginf()) for entry in self.bias]
        return self._groups


def _group(seen: Tensor) -> list[Group]:
    device = seen.device
    seen = seen if device.type == "cuda" else seen.cpu()  # not every device finds unique rows
    kinds, kind_of_row = torch.unique(seen, dim=0, return_inverse=True)
    order = torch.argsort(kind_of_row, stable=True)
    sizes = torch.bincount(kind_of_row, minlength=len(kinds)).tolist()
    full = kinds.all(dim=1).tolist()
    return [
        Group(rows.to(device), None if full[index] else kinds[index].nonzero().squeeze(1).to(device))
        for index, rows in enumerate(torch.split(order, sizes))
    ]
