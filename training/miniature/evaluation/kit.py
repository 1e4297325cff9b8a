"""The artist's kit on the miniature: do regions, masks and edit strength do what they say?

compose             two scenes of one ground by halves: strict F1 of the picture against the left things of the one and
                    the right things of the other. Things across the border, and what is painted about them, do not
                    count.
regional_prompt     two prompts, one in each half beside "on a ... ground" for all: share whose thing is found in its
                    half. The miniature's language knows no thing without a place, so they say "at the left" and "at the
                    right" (beside it: the same prompts, read by the whole picture, and with their boxes exchanged, so
                    that no patch where the words would put a thing can read them)
keep_outside_mask   what Keep Outside Mask, about the places where an edit happens, adds to preservation and to success
edit_strength       share of the edits that change the picture of which it moves steadily away from the source's, at
                    strengths 0 to 1 in quarters of v(source) + s (v(edited) - v(source))
place               a scene of large things placed into the middle of another of its ground, where they become as small
                    as the small ones (the base has never painted smaller ones): F1 on colour and shape of the middle,
                    enlarged to a whole picture, the centre within 16 px of it
regions             compositions of two to four regions in one list (compositions.py): share of the regions whose thing is
                    found in them, and the same of each region alone on the ground

Compose and place also get the same measure of the true picture (the ceiling) and of the picture into which nothing was
put (the floor).
"""
from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ....kernels.algebra import compose, restrict
from ....kernels.embedding import SemanticEmbedding
from ....kernels.regions import box_mask, confine, feather, insert, move_into, region_tokens
from ..captions import Edit
from ..scenes import COLOURS, GROUNDS, RADII, SHAPES, SIZE, Scene, Thing, choice, generator, render, scene
from ..score import distance, f1, strict
from ..text import encode, token_ids
from . import compositions
from .editing import REACH, judge, summary
from .reconstruction import parse_all
from .system import GUIDANCE, Miniature

LEFT, RIGHT, WHOLE = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)
LOW, HIGH = 20, 108  # px: the middle, in which a large thing is as large as a small one elsewhere
MIDDLE = (LOW / SIZE, LOW / SIZE, HIGH / SIZE, HIGH / SIZE)
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
STILL = 1.0  # grey levels of mean pixel distance below which a picture has not moved
PAINTED = 1 + 1 + 1 + 2 + 3 + len(STRENGTHS)  # pictures for each scene, without the compositions


def painted(count: int) -> int:
    """Pictures in all, over `count` scenes."""
    return PAINTED * count + compositions.painted(count)


def partners(scenes: Sequence[Scene], seed: int, sizes: Sequence[str] = tuple(RADII)) -> list[Scene]:
    """For every scene another test scene of the same ground, so that the join shows in the things alone. All of its
    things have one of `sizes`."""
    found = []
    for number, each in enumerate(scenes):
        rng = generator("test", number, purpose=53, seed=seed)
        drawn = (scene("test", int(rng.integers(10_000, 20_000)), seed) for _ in count())
        found.append(next(s for s in drawn if s.ground == each.ground and all(t.size in sizes for t in s.things)))
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


def composed(scenes: Sequence[Scene], others: Sequence[Scene], pictures: np.ndarray) -> float:
    """F1 of pictures as two scenes by halves."""
    pairs = [halves(a, b, seen) for a, b, seen in zip(scenes, others, parse_all(pictures))]
    return f1([truth for truth, _ in pairs], [seen for _, seen in pairs], strict)


def placed(others: Sequence[Scene], pictures: np.ndarray) -> float:
    """F1 of what the middle of pictures shows, as a picture of the scenes placed there."""
    enlarged = [np.asarray(Image.fromarray(picture[LOW:HIGH, LOW:HIGH]).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
                for picture in pictures]
    return f1(others, parse_all(enlarged), lambda a, b: a.name == b.name and distance(a, b) <= 16)


def joined(system: Miniature, scenes: Sequence[Scene], own: SemanticEmbedding, noise: Tensor, seed: int
           ) -> tuple[dict[str, float], dict[str, float]]:
    """{"f1", "ceiling", "floor"} of composing by halves and of placing into the middle."""
    def paint(embedding: SemanticEmbedding) -> np.ndarray:
        return system.paint_regions(embedding, [embedding.tokens], [1.0], noise)

    def guests(sizes: Sequence[str]) -> tuple[list[Scene], np.ndarray, SemanticEmbedding]:
        others = partners(scenes, seed, sizes)
        pictures = np.stack([render(scene) for scene in others])
        return others, pictures, system.embed(pictures, "tree128")

    truth, alone = np.stack([render(scene) for scene in scenes]), paint(own)
    others, pictures, other = guests(tuple(RADII))
    pasted = truth.copy()
    pasted[:, :, SIZE // 2:] = pictures[:, :, SIZE // 2:]
    halved = {"f1": paint(insert(own, other, box_mask(RIGHT))), "ceiling": pasted, "floor": alone}
    large, pictures, other = guests(("large",))
    small = truth.copy()
    shrunk = [np.asarray(Image.fromarray(p).resize((HIGH - LOW, HIGH - LOW), Image.Resampling.BOX)) for p in pictures]
    small[:, LOW:HIGH, LOW:HIGH] = np.stack(shrunk)
    middle = {"f1": paint(insert(own, move_into(other, MIDDLE), box_mask(MIDDLE))), "ceiling": small, "floor": alone}
    return ({name: composed(scenes, others, pictures) for name, pictures in halved.items()},
            {name: placed(large, pictures) for name, pictures in middle.items()})


def prompted(system: Miniature, total: int, noise: Tensor, seed: int) -> dict[str, float]:
    """Share of regional prompts whose thing is found in the half that their words name, at guidance 2.5 against empty
    prompts in the same boxes. By the boxes: "in_box" (each its half), "without boxes" (the whole picture),
    "exchanged"."""
    named, grounds = [], []
    for number in range(total):
        rng = generator("test", number, purpose=54, seed=seed)
        named.append([f"{colour} {choice(rng, SHAPES)}" for colour in rng.permutation(list(COLOURS))[:2]])
        grounds.append(choice(rng, tuple(GROUNDS)))
    texts = [[f"a large {pair[side]} at the {place}" for pair in named] for side, place in enumerate(("left", "right"))]

    def tokens(prompts: list[str], length: int | None = None) -> Tensor:
        with torch.no_grad():
            return encode(system.text, token_ids(prompts, system.device))[0][:, :length].float().cpu()

    def sequence(regions: list[list[str]], overall: list[str], boxes) -> tuple[SemanticEmbedding, Tensor]:
        # Seven words and the end mark, as Regional Prompt trims them.
        parts = [confine(region_tokens(tokens(words, 8), box), box_mask(box)) for words, box in zip(regions, boxes)]
        layout = compose(parts)
        return layout, torch.cat([layout.tokens, tokens(overall)], 1)

    def share(boxes) -> float:
        layout, positive = sequence(texts, [f"on a {ground} ground" for ground in grounds], boxes)
        _, negative = sequence([[""] * total] * 2, [""] * total, boxes)
        found = parse_all(system.paint_regions(layout, [positive, negative], [GUIDANCE, 1 - GUIDANCE], noise))
        return float(np.mean([any(t.name == pair[side] and (t.x >= SIZE / 2) == bool(side) for t in seen.things)
                              for pair, seen in zip(named, found) for side in (0, 1)]))

    return {name: share(boxes) for name, boxes in (("in_box", (LEFT, RIGHT)), ("without boxes", (WHOLE, WHOLE)),
                                                   ("exchanged", (RIGHT, LEFT)))}


def edit_mask(change: Edit) -> Tensor:
    """[128, 128]: white in squares about the places where the edit happens."""
    axis, mask = torch.arange(SIZE) + 0.5, torch.zeros(SIZE, SIZE)
    for thing in (change.subject, change.result):
        if thing is not None:
            reach = thing.radius + REACH
            mask[torch.outer((axis - thing.y).abs() <= reach, (axis - thing.x).abs() <= reach)] = 1
    return mask


def kept_outside(system: Miniature, changes: Sequence[Edit], own: SemanticEmbedding, edited: SemanticEmbedding,
                 noise: Tensor):
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


def steady(system: Miniature, own: SemanticEmbedding, edited: SemanticEmbedding,
           noise: Tensor) -> tuple[float | None, float]:
    """(share of the edits that change the picture of which it moves away from the source's at every step of the
    strength; share of the edits that change the picture at all)."""
    pictures = [system.paint_regions(own, [edited.tokens, own.tokens], [s, 1 - s], noise).astype(np.float32)
                for s in STRENGTHS]
    moved = np.stack([abs(p - pictures[0]).mean((1, 2, 3)) for p in pictures])
    changed = moved[-1] > STILL
    away = (np.diff(moved[:, changed], axis=0) > -STILL).all(0)
    return float(away.mean()) if changed.any() else None, float(changed.mean())


def run(system: Miniature, changes: Sequence[Edit], sources: np.ndarray, noise: Tensor, seed: int) -> tuple[dict, dict]:
    """(every figure, as `--json` prints them; further figures for the page)."""
    scenes = [change.source for change in changes]
    own = system.embed(sources, "tree128")
    edited = system.edit(own, [change.instruction for change in changes], "parallel")
    gain, success = kept_outside(system, changes, own, edited, noise)
    halved, middle = joined(system, scenes, own, noise, seed)
    regional = prompted(system, len(scenes), noise, seed)
    monotonic, changed = steady(system, own, edited, noise)
    figures = {
        "compose": {"f1": halved.pop("f1")},
        "regional_prompt": {"in_box": regional.pop("in_box")},
        "keep_outside_mask": {"preservation_gain": gain, "success_change": success},
        "edit_strength": {"monotonic": monotonic},
        "place": {"f1": middle.pop("f1")},
        "regions": compositions.figures(system, len(scenes), seed),
    }
    return figures, {"compose": halved, "regional_prompt": regional,
                     "regions": compositions.figures(system, len(scenes), seed, 1.0),
                     "edit_strength": {"share of edits that change the picture": changed}, "place": middle}
