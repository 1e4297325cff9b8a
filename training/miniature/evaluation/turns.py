"""Where edits fail first: a twin beside the thing that is named, and the fifth edit in a row.

twins   edits in which another thing of the scene shares the named one's colour, or its shape (of each kind as many);
        success and preservation as in `editing`
chain   five edits of a scene, each by the edit decoder from what it wrote before; success of the fifth, and the micro F1
        of the things that none of the five names
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import numpy as np
from torch import Tensor

from ....kernels.embedding import SemanticEmbedding
from ..captions import OPERATIONS, Edit
from ..editor import change_of, random_edit, shares
from ..scenes import Scene, generator, render, scene
from .editing import judge, same_and_near, summary
from .reconstruction import parse_all
from .system import Miniature

KINDS = ("colour", "shape")
DECODERS = ("autoregressive", "parallel", "oracle")
TWINS = 100  # edits of each kind
CHAINS = 64
LENGTH = 5
_TWINS, _CHAINS = 61, 62  # these purposes of scenes.generator


def twins(total: int) -> int:
    """Edits of each kind for an evaluation of `total` scenes."""
    return min(TWINS, total)


def chains(total: int) -> int:
    return min(CHAINS, total)


def twin_edits(kind: str, total: int, seed: int) -> list[Edit]:
    """`total` edits of test scenes beyond those of the other figures, by all operations that name a thing in turn."""
    operations, found = [op for op in OPERATIONS if op != "add"], []
    for index in count(100_000 * (1 + KINDS.index(kind))):
        operation = operations[len(found) % len(operations)]
        change = change_of("test", index, seed, operation)
        if change.operation == operation and shares(change, kind):
            found.append(change)
            if len(found) == total:
                return found


def chain_of(index: int, seed: int) -> list[Edit]:
    """Five edits in a row of a test scene that leave at least one thing."""
    rng, made, now = generator("test", index, _CHAINS, seed), [], scene("test", index, seed)
    while len(made) < LENGTH:
        change = random_edit(now, rng)
        if change.target.things and change.target != now:
            made.append(change)
            now = change.target
    return made


def untouched(chain: Sequence[Edit]) -> tuple:
    """The things of the first scene that no edit names."""
    return tuple(t for t in chain[0].source.things if all(t != change.subject for change in chain))


def kept(chains: Sequence[Sequence[Edit]], found: Sequence[Scene]) -> float | None:
    """Share of the untouched things that are found again, colour and shape right, within 6 px."""
    wanted = [(t, seen) for chain, seen in zip(chains, found) for t in untouched(chain)]
    hits = [any(same_and_near(t, other) for other in seen.things) for t, seen in wanted]
    return float(np.mean(hits)) if hits else None


def run_twins(system: Miniature, total: int, seed: int) -> dict[str, dict]:
    """{decoder: {"success", "preservation", "colour": the same two, "shape": the same two}} of the edit decoder in both
    modes and of the true edit's embedding."""
    changes = [change for kind in KINDS for change in twin_edits(kind, twins(total), seed)]
    own = system.embed(np.stack([render(change.source) for change in changes]), "tree128")
    words = [change.instruction for change in changes]
    made = {mode: system.edit(own, words, mode) for mode in DECODERS[:2]}
    made["oracle"] = system.embed(np.stack([render(change.target) for change in changes]), "tree128")
    noise, figures = system.noise("test", range(_TWINS * 10_000, _TWINS * 10_000 + len(changes)), seed), {}
    for name, e in made.items():
        verdicts = [judge(c, f) for c, f in zip(changes, parse_all(system.paint(e, "tree128", noise)))]
        half = len(verdicts) // 2
        figures[name] = summary(verdicts) | {k: summary(v) for k, v in zip(KINDS, (verdicts[:half], verdicts[half:]))}
    return figures


def written(system: Miniature, chains: Sequence[Sequence[Edit]]) -> SemanticEmbedding:
    """What the decoder has written after the last edit of every chain, in one pass each."""
    now = system.embed(np.stack([render(chain[0].source) for chain in chains]), "tree128")
    for turn in range(LENGTH):
        now = replace(now, tokens=system.edit(now, [chain[turn].instruction for chain in chains], "parallel").tokens)
    return now


def run_chains(system: Miniature, total: int, seed: int, noise: Tensor) -> dict[str, float | None]:
    made = [chain_of(index, seed) for index in range(chains(total))]
    found = parse_all(system.paint(written(system, made), "tree128", noise[:len(made)]))
    return {"success": summary([judge(chain[-1], seen) for chain, seen in zip(made, found)])["success"],
            "preservation": kept(made, found)}
