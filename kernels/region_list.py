"""The list of regions that the Regions node keeps as text: JSON, versioned and bounded, and what it means.

    {"version": 1, "regions": [{"name": "sky", "colour": "#56b4e9", "on": true, "box": [0, 0, 1, 0.4], ...}, ...]}

Later regions lie on top. `box` is [x, y, width, height] as shares of the picture's sides. `mask`, a painted shape that goes
before the box, is the lengths of its runs on a grid of 256 x 256, row by row, black and white in turn, black first. Only `box`
or `mask` is needed; every other field has the default that `Region` gives it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le, Len
from pydantic import Strict, StringConstraints, model_validator
from torch import Tensor

from . import regions, schema
from .algebra import with_balance, with_strength
from .embedding import MASK_SIDE, SemanticEmbedding

VERSION = 1
MOST = 64  # regions
OTHERS = 16  # embeddings that they can show
LONGEST = 2**20  # characters of the text
REMEDY = "draw the region anew"
PIXELS = MASK_SIDE**2

Factor = Annotated[float, Strict(), Ge(0), Le(2)]
Balance = Annotated[float, Strict(), Ge(-1), Le(1)]
Runs = Annotated[tuple[schema.whole(0, PIXELS), ...], Len(1, PIXELS + 1)]
Box = tuple[schema.Share, schema.Share, schema.Share, schema.Share]


class Region(schema.Closed):
    """One region.

    speaks: 0, the prompt does, or the number of a connected embedding. placed: that embedding is moved into the region as a
    whole, else each part of it stays where it is. strength: factor on its attention. balance: -1 only the coarsest level of it,
    0 as trained, 1 only the finest. start, end: the part of the sampling in which it is seen. feather: width of the soft border
    inside, as a share of the picture's side. mode: "replace" or "join", as in `regions.insert`.
    """

    name: Annotated[str, StringConstraints(max_length=100)] = ""
    colour: Annotated[str, StringConstraints(pattern=r"^#[0-9a-f]{6}$")] = "#56b4e9"
    on: schema.Flag = True
    box: Box | None = None
    mask: Runs | None = None
    feather: schema.Share = 0.0
    speaks: schema.whole(0, OTHERS) = 0
    placed: schema.Flag = False
    prompt: Annotated[str, StringConstraints(max_length=10_000)] = ""
    strength: Factor = 1.0
    balance: Balance = 0.0
    start: schema.Share = 0.0
    end: schema.Share = 1.0
    mode: Literal["replace", "join"] = "replace"

    @model_validator(mode="after")
    def _whole(self) -> Region:
        if self.box is None and self.mask is None:
            raise ValueError(f"The {self} has neither a box nor a mask: {REMEDY}.")
        if self.mask is not None and sum(self.mask) != PIXELS:
            raise ValueError(f"The painted mask of the {self} covers {sum(self.mask)} of {PIXELS} pixels: {REMEDY}.")
        if self.start > self.end:
            raise ValueError(f"The {self} starts at {self.start:g}, after its end at {self.end:g}: swap them.")
        return self

    def __str__(self) -> str:
        return f"region {schema.short(self.name)}" if self.name else "region without a name"

    def painted(self) -> Tensor | None:
        """The mask, float32 [256, 256] of 0 and 1, or None where the box is the region."""
        if self.mask is None:
            return None
        lengths = torch.tensor(self.mask)
        return (torch.arange(len(lengths)) % 2).float().repeat_interleave(lengths).reshape(MASK_SIDE, MASK_SIDE)

    def shape(self, found: tuple[tuple[float, ...], Tensor | None] | None = None) -> tuple[tuple[float, ...], Tensor]:
        """(box (x0, y0, x1, y1), mask [256, 256] in 0..1), feathered: of what was painted, else of the box. ValueError where
        nothing is.

        found: (box, mask or None for all of the box) that goes before both.
        """
        try:
            box, mask = found or regions.region([self.box or ()], self.painted())
        except ValueError as error:
            raise ValueError(f"Of the {self}: {error}") from None
        mask = regions.box_mask(box) if mask is None else mask
        return box, regions.feather(mask, self.feather) if self.feather else mask

    def laid_on(self, base: SemanticEmbedding | None, part: SemanticEmbedding, mask: Tensor) -> SemanticEmbedding:
        """`base` with what speaks in this region, `part`, in the mask [256, 256], as strong, as fine and as long as the region
        says."""
        part = with_balance(with_strength(part, self.strength), self.balance)
        try:
            return regions.insert(base, part, mask, self.mode, self.start, self.end)
        except ValueError as error:
            raise ValueError(f"The {self} cannot be laid on what is there: {error}") from None


class RegionList(schema.Closed):
    version: schema.whole(1, 2**31) = VERSION
    regions: Annotated[tuple[Region, ...], Len(0, MOST)] = ()


def parse(text: str) -> tuple[Region, ...]:
    """The regions of such a text, those that are off among them; none for an empty one. ValueError in one sentence for any
    other text, before anything is built of it."""
    if not text.strip():
        return ()
    if len(text) > LONGEST:
        raise ValueError(f"The list of regions has {len(text)} characters and at most {LONGEST} are read: {REMEDY}.")
    try:
        value = schema.read_json(text)
    except ValueError as error:
        raise ValueError(f"The list of regions cannot be read, {error}: {REMEDY}.") from None
    version, regions = value.get("version"), value.get("regions")
    if type(version) is int and version > VERSION:
        raise ValueError(f"The list of regions is of version {version} and this pack reads {VERSION}: update the pack.")
    if isinstance(regions, list) and len(regions) > MOST:
        raise ValueError(f"There are {len(regions)} regions and at most {MOST} are taken: join some of them.")
    return schema.parse(RegionList, value, "The list of regions", REMEDY).regions


def runs(mask: Tensor) -> list[int]:
    """The lengths of the runs of a mask [256, 256], white where it is above a half: what `Region.mask` holds."""
    flat = (mask > 0.5).flatten().int()
    ends = (flat.diff(prepend=flat.new_zeros(1)) != 0).nonzero()[:, 0].tolist()
    edges = [0, *ends, flat.numel()]
    return [after - before for before, after in zip(edges, edges[1:])]
