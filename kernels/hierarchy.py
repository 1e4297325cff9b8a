"""Hierarchies: which grids a semantic embedding has, and which box of the image every token owns.

Token order is level by level, cells row by row, slots within a cell. Everything else in the pack (the query table of
the adapter, the visibility of Flux's patches, the boxes of an embedding) is derived from the lists made here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MAX_LEVELS = 64
MAX_SIDE = 1024  # cells
MAX_TOKENS = 2**16  # far more than any model's attention takes; a file that says more is damaged


@dataclass(frozen=True)
class Level:
    """One grid over the whole image: `rows` x `cols` cells of equal size, `tokens` tokens in every cell."""

    rows: int
    cols: int
    tokens: int

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"A level's {name} must be a whole number of at least 1, not {value!r}.")
            most = MAX_TOKENS if name == "tokens" else MAX_SIDE
            if value > most:
                raise ValueError(f"A level's {name} must be at most {most}, not {value}: write a smaller hierarchy.")

    @property
    def token_count(self) -> int:
        return self.rows * self.cols * self.tokens


@dataclass(frozen=True)
class Hierarchy:
    """Levels in token order. Two levels of one grid are refused: they would be one level with more tokens."""

    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("A hierarchy needs at least one level.")
        if len(self.levels) > MAX_LEVELS or self.token_count > MAX_TOKENS:
            raise ValueError(
                f"The hierarchy has {len(self.levels)} levels and {self.token_count} tokens, where {MAX_LEVELS} and {MAX_TOKENS} "
                "are the most: write a smaller one."
            )
        grids = [(level.rows, level.cols) for level in self.levels]
        for grid in grids:
            if grids.count(grid) > 1:
                raise ValueError(
                    f"The hierarchy has two levels of {grid[0]}x{grid[1]} cells; write them as one."
                )

    @property
    def token_count(self) -> int:
        return sum(level.token_count for level in self.levels)

    @cached_property
    def _table(self) -> Tensor:
        """[T, 3] int64: level, cell within the level (row-major), slot within the cell."""
        rows = []
        for index, level in enumerate(self.levels):
            cells = range(level.rows * level.cols)
            rows += [(index, cell, slot) for cell in cells for slot in range(level.tokens)]
        return torch.tensor(rows, dtype=torch.int64)

    def boxes(self) -> Tensor:
        """[T, 4] float32: (x0, y0, x1, y1) of every token in unit coordinates, y downwards."""
        boxes = []
        for level in self.levels:
            for row in range(level.rows):
                for col in range(level.cols):
                    box = (col / level.cols, row / level.rows, (col + 1) / level.cols, (row + 1) / level.rows)
                    boxes += [box] * level.tokens
        return torch.tensor(boxes, dtype=torch.float32)

    def level_ids(self) -> Tensor:
        """[T] int64: index of the token's level."""
        return self._table[:, 0].clone()

    def cells(self) -> Tensor:
        """[T] int64: index of the token's cell inside its level, row-major."""
        return self._table[:, 1].clone()

    def slots(self) -> Tensor:
        """[T] int64: index of the token inside its cell."""
        return self._table[:, 2].clone()

    def index_in(self, table: Hierarchy) -> Tensor:
        """[T] int64: for every token of this hierarchy its row in the bigger `table`.

        A level takes the first `tokens` slots of the cells of the table's level of the same grid, so that one query
        table serves every hierarchy that it contains. ValueError where it contains no such level.
        """
        starts, index = {}, []
        start = 0
        for level in table.levels:
            starts[level.rows, level.cols] = (start, level.tokens)
            start += level.token_count
        for level in self.levels:
            first, tokens = starts.get((level.rows, level.cols), (0, 0))
            if tokens < level.tokens:
                raise ValueError(
                    f"A level of {level.rows}x{level.cols} cells with {level.tokens} tokens each is not in the query"
                    f" table {table.to_json()}; choose a hierarchy that the table contains."
                )
            cells = torch.arange(level.rows * level.cols).unsqueeze(1)
            index.append((first + cells * tokens + torch.arange(level.tokens)).flatten())
        return torch.cat(index)

    def to_json(self) -> list[list[int]]:
        """`[[rows, cols, tokens], ...]`, as it stands in checkpoints, configs and workflows."""
        return [[level.rows, level.cols, level.tokens] for level in self.levels]

    @classmethod
    def from_json(cls, levels: Iterable[Iterable[int]]) -> Hierarchy:
        made = []
        for level in levels:
            numbers = tuple(level) if isinstance(level, Iterable) and not isinstance(level, str) else ()
            if len(numbers) != 3:
                raise ValueError(f"A hierarchy's level is written as [rows, columns, tokens per cell], not {level!r}.")
            made.append(Level(*numbers))
        return cls(tuple(made))


PRESETS: dict[str, Hierarchy] = {
    name: Hierarchy.from_json(levels)
    for name, levels in {
        "global16": [[1, 1, 16]],
        "global32": [[1, 1, 32]],
        "quad64": [[1, 1, 32], [2, 2, 8]],
        "tree64": [[1, 1, 16], [2, 2, 4], [4, 4, 2]],
        "tree112": [[1, 1, 16], [2, 2, 8], [4, 4, 4]],
        "tree128": [[1, 1, 32], [2, 2, 8], [4, 4, 4]],
    }.items()
}


def hierarchy(name_or_levels: str | Hierarchy | Iterable[Iterable[int]]) -> Hierarchy:
    """The hierarchy of a preset's name or of a list of `[rows, cols, tokens]`."""
    if isinstance(name_or_levels, Hierarchy):
        return name_or_levels
    if not isinstance(name_or_levels, str):
        return Hierarchy.from_json(name_or_levels)
    if name_or_levels in PRESETS:
        return PRESETS[name_or_levels]
    close = difflib.get_close_matches(name_or_levels, PRESETS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(PRESETS)}."
    raise ValueError(f"There is no hierarchy called {name_or_levels!r}; {hint}")
