"""The artist's kit on the miniature: do regions, masks and edit strength do what they say?

compose             two scenes of one ground by halves: strict F1 of the picture against the left things of the one and the
                    right things of the other. Things across the border, and what is painted about them, do not count.
regional_prompt     two prompts, one in each half beside "on a ... ground" for all: share whose thing is found in its half
keep_outside_mask   what Keep Outside Mask, about the places where an edit happens, adds to preservation and to success
edit_strength       share of edits of which the picture moves steadily away from the source's, at strengths 0 to 1 in
                    quarters of v(source) + s (v(edited) - v(source))
place               a scene placed into the middle half of another of its ground: F1 on colour and shape, the centre within
                    8 px of where the box puts it
"""
from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from ....kernels.algebra import compose, restrict
from ....kernels.embedding import SemanticEmbedding
from ....kernels.regions import box_mask, confine, feather, insert, move_into, region_tokens
from ..captions import Edit
from ..scenes import COLOURS, GROUNDS, SHAPES, SIZE, Scene, Thing, choice, generator, render, scene
from ..score import distance, f1, strict
from ..text import encode, token_ids
from .editing import REACH, judge, summary
from .reconstruction import parse_all
from .system import GUIDANCE, Miniature

LEFT, RIGHT, MIDDLE = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.25, 0.25, 0.75, 0.75)
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
STILL = 1.0  # grey levels of mean pixel distance below which a picture has not moved
PAINTED = 1 + 1 + 1 + 2 + len(STRENGTHS)  # pictures for each scene


def partners(scenes: Sequence[Scene], seed: int) -> list[Scene]:
    """For every scene another test scene of the same ground, so that the join shows in the things alone."""
    found = []
    for number, each in enumerate(scenes):
        rng = generator("test", number, purpose=53, seed=seed)
        drawn = (scene("test", int(rng.integers(10_000, 20_000)), seed) for _ in count())
        found.append(next(other for other in drawn if other.ground == each.ground))
    return found


def halves(left: Scene, right: Scene, seen: Scene) -> tuple[Scene, Scene]:
    """(the things that should be seen, those of `seen` that count)."""
    def whole(thing: Thing, low: float, high: float) -> bool:
        return low <= thing.x - thing.radius and thing.x + thing.radius <= high

    middle = SIZE / 2
    truth = [t for t in left.things if whole(t, 0, middle)] + [t for t in right.things if whole(t, middle, SIZE)]
    across = [t for s in (left, right) for t in s.things if abs(t.x - middle) < t.radius]
    counted = [t for t in seen.things if all(distance(t, a) > a.radius + REACH for a in across)]
    return Scene(left.ground, tuple(truth)), Scene(seen.ground, tuple(counted))


def composed(system: Miniature, scenes, others, own: SemanticEmbedding, other: SemanticEmbedding, noise: Tensor) -> float:
    """F1 of two scenes by halves."""
    joined = insert(own, other, box_mask(RIGHT))
    found = parse_all(system.paint_regions(joined, [joined.tokens], [1.0], noise))
    pairs = [halves(a, b, seen) for a, b, seen in zip(scenes, others, found)]
    return f1([truth for truth, _ in pairs], [seen for _, seen in pairs], strict)


def placed(system: Miniature, others, own: SemanticEmbedding, other: SemanticEmbedding, noise: Tensor) -> float:
    """F1 of scenes placed into the middle of others, over what is found in there."""
    x0, y0, x1, _ = (side * SIZE for side in MIDDLE)
    share = (x1 - x0) / SIZE
    joined = insert(own, move_into(other, MIDDLE), box_mask(MIDDLE))
    found = parse_all(system.paint_regions(joined, [joined.tokens], [1.0], noise))

    def moved(s: Scene) -> Scene:
        return Scene(s.ground, tuple(Thing(t.shape, t.colour, t.size, x0 + share * t.x, y0 + share * t.y) for t in s.things))

    inside = [Scene(s.ground, tuple(t for t in s.things if max(abs(t.x - SIZE / 2), abs(t.y - SIZE / 2)) < share * SIZE / 2))
              for s in found]
    return f1([moved(s) for s in others], inside, lambda a, b: a.name == b.name and distance(a, b) <= 8)


def prompted(system: Miniature, total: int, noise: Tensor, seed: int) -> float:
    """Share of regional prompts whose thing is found in its half, at guidance 2.5 against empty prompts in the same boxes."""
    named, grounds = [], []
    for number in range(total):
        rng = generator("test", number, purpose=54, seed=seed)
        named.append([f"{colour} {choice(rng, SHAPES)}" for colour in rng.permutation(list(COLOURS))[:2]])
        grounds.append(choice(rng, tuple(GROUNDS)))
    texts = [[f"a large {pair[side]}" for pair in named] for side in (0, 1)]

    def tokens(prompts: list[str], length: int | None = None) -> Tensor:
        with torch.no_grad():
            return encode(system.text, token_ids(prompts, system.device))[0][:, :length].float().cpu()

    def sequence(regions: list[list[str]], overall: list[str]) -> tuple[SemanticEmbedding, Tensor]:
        # Four words and the end mark, as Regional Prompt trims them.
        parts = [confine(region_tokens(tokens(words, 5), box), box_mask(box)) for words, box in zip(regions, (LEFT, RIGHT))]
        layout = compose(parts)
        return layout, torch.cat([layout.tokens, tokens(overall)], 1)

    layout, positive = sequence(texts, [f"on a {ground} ground" for ground in grounds])
    _, negative = sequence([[""] * total] * 2, [""] * total)
    found = parse_all(system.paint_regions(layout, [positive, negative], [GUIDANCE, 1 - GUIDANCE], noise))
    hits = [any(t.name == pair[side] and (t.x >= SIZE / 2) == bool(side) for t in seen.things)
            for pair, seen in zip(named, found) for side in (0, 1)]
    return float(np.mean(hits))


def edit_mask(change: Edit) -> Tensor:
    """[128, 128]: white in squares about the places where the edit happens."""
    axis, mask = torch.arange(SIZE) + 0.5, torch.zeros(SIZE, SIZE)
    for thing in (change.subject, change.result):
        if thing is not None:
            reach = thing.radius + REACH
            mask[torch.outer((axis - thing.y).abs() <= reach, (axis - thing.x).abs() <= reach)] = 1
    return mask


def kept_outside(system: Miniature, changes: Sequence[Edit], own: SemanticEmbedding, edited: SemanticEmbedding, noise: Tensor):
    """(preservation gained, success changed) by Keep Outside Mask at its default feather."""
    kept = []
    for number, change in enumerate(changes):
        one = slice(number, number + 1)
        parts = (SemanticEmbedding(e.tokens[one], e.boxes, e.levels, e.strengths) for e in (edited, own))
        kept.append(restrict(*parts, feather(edit_mask(change), 0.05)).tokens)
    figures = []
    for tokens in (edited.tokens, torch.cat(kept)):
        found = parse_all(system.paint_regions(own, [tokens], [1.0], noise))
        figures.append(summary([judge(change, seen) for change, seen in zip(changes, found)]))
    return tuple(figures[1][name] - figures[0][name] for name in ("preservation", "success"))


def steady(system: Miniature, own: SemanticEmbedding, edited: SemanticEmbedding, noise: Tensor) -> float:
    """Share of edits whose picture moves away from the source's at every step of the strength (or stays where it is)."""
    pictures = [system.paint_regions(own, [edited.tokens, own.tokens], [s, 1 - s], noise).astype(np.float32) for s in STRENGTHS]
    moved = np.stack([abs(p - pictures[0]).mean((1, 2, 3)) for p in pictures])
    return float((np.diff(moved, axis=0) > -STILL).all(0).mean())


def run(system: Miniature, changes: Sequence[Edit], sources: np.ndarray, noise: Tensor, seed: int) -> dict:
    """Every figure, as `--json` prints them."""
    scenes = [change.source for change in changes]
    others = partners(scenes, seed)
    own = system.embed(sources, "tree128")
    other = system.embed(np.stack([render(s) for s in others]), "tree128")
    edited = system.edit(own, [change.instruction for change in changes], "parallel")
    gain, success = kept_outside(system, changes, own, edited, noise)
    return {
        "compose": {"f1": composed(system, scenes, others, own, other, noise)},
        "regional_prompt": {"in_box": prompted(system, len(scenes), noise, seed)},
        "keep_outside_mask": {"preservation_gain": gain, "success_change": success},
        "edit_strength": {"monotonic": steady(system, own, edited, noise)},
        "place": {"f1": placed(system, others, own, other, noise)},
    }
