"""Which blocks of a Flux model: the widget's text, and the pairs by which core says where it is."""

from __future__ import annotations

import re

# Pairs of transformer_options' `block_type` and `block_index`.
Blocks = frozenset[tuple[str, int]]

_PART = re.compile(r"(double|single)(?:\s+(\d+)(?:\s*-\s*(\d+))?)?")


def parse_blocks(text: str, double: int, single: int) -> Blocks | None:
    """`all`, `double`, `single`, or ranges such as `double 0-9, single 20-37`, counted from 0 within each kind.

    double, single: how many the model has. None where that is all of them. ValueError in one sentence otherwise.
    """
    if text.strip().lower() in ("all", ""):
        return None
    counts, chosen = {"double": double, "single": single}, set()
    for part in text.lower().split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"The blocks {text!r} are not understood: write `all`, `double`, `single`, or ranges such as "
                "`double 0-9, single 20-37`."
            )
        kind, first, last = match.groups()
        first = 0 if first is None else int(first)
        last = int(last) if last is not None else counts[kind] - 1 if match[2] is None else first
        if first > last:
            raise ValueError(f"The blocks {part.strip()!r} run backwards: write the smaller number first.")
        if last >= counts[kind]:
            raise ValueError(f"There is no {kind} block {last}: this model has {counts[kind]} of them, counted from 0.")
        chosen |= {(kind, index) for index in range(first, last + 1)}
    return None if len(chosen) == double + single else frozenset(chosen)
