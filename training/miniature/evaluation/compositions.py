"""Many regions at once on the miniature: is everything where its region says?

Compositions of two to four regions on a plain ground, each in a quarter of the picture of its own and with one thing in it:
a box or a painted disc, a prompt or the embedding of a picture that shows the thing there. `in_region`: share of the regions
in which the thing is found. `alone`: the same of each region alone on the ground, which is what its words or its picture can
do at all. Prompts are read beside the ground's tokens (mode join) at twice their strength, since several in one picture hear one
another; embeddings in the ground's stead. Beside it, both at strength 1.
"""
from __future__ import annotations

from itertools import product

import numpy as np
import torch

from ....kernels.embedding import MASK_SIDE, SemanticEmbedding
from ....kernels.region_list import Region, runs
from ....kernels.regions import region_tokens
from ....kernels.words import PAD
from ..scenes import COLOURS, GROUNDS, SHAPES, SIZE, Scene, Thing, choice, generator, place_centre, render
from ..text import encode, token_ids
from .reconstruction import parse_all
from .system import BATCH, Miniature

QUARTERS = tuple(product(("top", "bottom"), ("left", "right")))
MORE = 2  # compositions for each scene that is asked for: 64 of them know a share to two points only
STRENGTH = 2.0  # of prompts
SHARE = 0.44  # of the picture's side: a quarter, a little less


def count(number: int) -> int:
    """How many regions a composition has."""
    return 2 + number % 3


def painted(total: int) -> int:
    """Pictures in all for so many scenes: every composition, and each of its regions alone, at two strengths."""
    return 2 * sum(1 + count(number) for number in range(MORE * total))


def prompted(system: Miniature, base: SemanticEmbedding, region: Region) -> SemanticEmbedding:
    """`base` with the region's prompt in it, the words and the end mark without padding, as the node does it."""
    box, mask = region.shape()
    ids = token_ids([region.prompt], system.device)
    with torch.no_grad():
        tokens = encode(system.text, ids)[0][:, : int((ids[0] != PAD).sum())].float().cpu()
    return region.laid_on(base, region_tokens(tokens, box), mask)


def composition(number: int, seed: int, strength: float = STRENGTH) -> tuple[str, list[tuple[Region, Thing]]]:
    """(the ground, its regions with the thing that each shows) of one composition."""
    rng = generator("test", number, purpose=55, seed=seed)
    ground, found = choice(rng, tuple(GROUNDS)), []
    colours = [colour for colour in rng.permutation(list(COLOURS)) if colour != ground]
    for place in rng.permutation(len(QUARTERS))[: count(number)]:
        down, across = QUARTERS[place]
        shape, colour = choice(rng, SHAPES), str(colours[len(found)])
        x, y = place_centre(f"{down} {across}", Thing(shape, colour, "large", 0, 0).radius)
        left, top = (0.0 if end in ("left", "top") else 1 - SHARE for end in (across, down))
        pixels = (torch.arange(MASK_SIDE) + 0.5) / MASK_SIDE
        disc = (pixels - left - SHARE / 2) ** 2 + (pixels[:, None] - top - SHARE / 2) ** 2 <= (0.55 * SHARE) ** 2
        spoken = bool(rng.integers(2))
        where = {"mask": tuple(runs(disc.float()))} if rng.integers(2) else {"box": (left, top, SHARE, SHARE)}
        words = {"prompt": f"a large {colour} {shape} at the {down} {across}", "mode": "join", "strength": strength}
        what = words if spoken else {"speaks": 1}
        found.append((Region(**where, **what), Thing(shape, colour, "large", x, y)))
    return ground, found


def figures(system: Miniature, total: int, seed: int, strength: float = STRENGTH) -> dict[str, float]:
    """{"in_region", "alone"} over MORE compositions for each of `total` scenes."""
    shown = {"in_region": [], "alone": []}
    for first in range(0, MORE * total, BATCH):
        numbers = range(first, min(first + BATCH, MORE * total))
        made = [composition(number, seed, strength) for number in numbers]
        laid, rows = [], []
        for row, composed in enumerate(made):
            embeddings = _laid(system, *composed)
            laid += embeddings
            rows += [row] * len(embeddings)
        found = iter(parse_all(system.paint_each(laid, system.noise("test", numbers, seed)[rows])))
        for _, regions in made:
            whole = next(found)
            shown["in_region"] += [_is_there(whole, *each) for each in regions]
            shown["alone"] += [_is_there(next(found), *each) for each in regions]
    return {name: float(np.mean(values)) for name, values in shown.items()}


def _laid(system: Miniature, ground: str, regions: list[tuple[Region, Thing]]) -> list[SemanticEmbedding]:
    """All regions on the ground, and each of them alone on it."""
    grounds = [render(Scene(ground, things)) for things in ((), *((thing,) for _, thing in regions))]
    own = system.embed(np.stack(grounds), "tree128")
    base, *pictures = (SemanticEmbedding(tokens[None], own.boxes, own.levels, own.strengths) for tokens in own.tokens)

    def lay(base: SemanticEmbedding, region: Region, picture: SemanticEmbedding) -> SemanticEmbedding:
        return region.laid_on(base, picture, region.shape()[1]) if region.speaks else prompted(system, base, region)

    together = base
    for (region, _), picture in zip(regions, pictures):
        together = lay(together, region, picture)
    return [together, *(lay(base, region, picture) for (region, _), picture in zip(regions, pictures))]


def _is_there(seen: Scene, region: Region, thing: Thing) -> bool:
    scale, mask = MASK_SIDE / SIZE, region.shape()[1]
    at = [(min(int(t.y * scale), MASK_SIDE - 1), min(int(t.x * scale), MASK_SIDE - 1)) for t in seen.things if t.name == thing.name]
    return any(mask[place] > 0 for place in at)
