"""Editing: is the instruction fulfilled, and does the rest of the scene stay as it was?

Two shapes are never closer than 34 px, so a radius of 12 px around a place belongs to one thing only.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..captions import OPERATIONS, Edit, caption
from ..editor import change_of
from ..scenes import Scene, Thing, render
from ..score import NEAR, distance, matches
from .reconstruction import parse_all
from .system import Miniature

DECODERS = ("autoregressive", "parallel", "oracle", "copy", "sdedit")
REACH = 12.0  # px: a thing within this distance of its place counts as there
STARTS = (0.6, 0.75, 0.85, 0.95)  # SDEdit's strengths to choose from: the times at which it may begin
TRIALS = 30  # validation scenes on which it is chosen


@dataclass(frozen=True)
class Verdict:
    """One edited picture. kept: untouched things found again; wanted: how many there are; strange: things elsewhere."""

    fulfilled: bool
    kept: int
    wanted: int
    strange: int


def instructions(split: str, count: int, seed: int) -> list[Edit]:
    """One edit for each of the first `count` scenes. Each scene gets the operation that has come up least so far of
    those that are possible there (nothing can be added to a full scene), so that all come up about equally often."""
    edits, seen = [], Counter()
    for index in range(count):
        for operation in sorted(OPERATIONS, key=lambda name: seen[name]):
            change = change_of(split, index, seed, operation)
            if change.operation == operation:
                break
        seen[change.operation] += 1
        edits.append(change)
    return edits


def fulfilled(change: Edit, found: Scene) -> bool:
    """Whether the picture that was parsed as `found` obeys the instruction.

    remove             nothing, of whatever name, within 12 px of where the thing stood
    add                a thing of the new one's colour and shape within 12 px of its place
    recolour, replace  a thing of the new colour and shape within 12 px of the old place
    move               a thing of that colour and shape within 12 px of the new place and nearer to it than to the old
                       one, and none within 12 px of the old place that is nearer to that
    """
    old, new = change.subject, change.result
    if new is None:
        return not any(distance(thing, old) <= REACH for thing in found.things)
    named = [thing for thing in found.things if thing.name == new.name]
    if change.operation != "move":
        return any(distance(thing, new) <= REACH for thing in named)
    arrived = [distance(thing, new) <= REACH and distance(thing, new) < distance(thing, old) for thing in named]
    left = [distance(thing, old) <= REACH and distance(thing, old) <= distance(thing, new) for thing in named]
    return any(arrived) and not any(left)


def judge(change: Edit, found: Scene) -> Verdict:
    """The verdict on one picture. Untouched are all things of the source scene except the one in the instruction. An
    untouched thing is kept if colour and shape are right and the centre is within 6 px. Strange are the things that are
    neither kept nor within 12 px of the place of the edit: what happens there belongs to success."""
    untouched = tuple(thing for thing in change.source.things if thing != change.subject)
    kept = matches(Scene(change.source.ground, untouched), found, same_and_near)
    explained = {id(thing) for _, thing in kept}
    places = [thing for thing in (change.subject, change.result) if thing is not None]
    strange = [thing for thing in found.things
               if id(thing) not in explained and all(distance(thing, place) > REACH for place in places)]
    return Verdict(fulfilled(change, found), len(kept), len(untouched), len(strange))


def same_and_near(a: Thing, b: Thing) -> bool:
    return a.name == b.name and distance(a, b) <= NEAR


def summary(verdicts: Sequence[Verdict]) -> dict[str, float | None]:
    """Share of fulfilled instructions, and the micro F1 of the untouched things; None where there is nothing to
    count."""
    found = sum(v.kept + v.strange for v in verdicts)
    total = sum(v.wanted for v in verdicts) + found
    return {"success": float(np.mean([v.fulfilled for v in verdicts])) if verdicts else None,
            "preservation": 2 * sum(v.kept for v in verdicts) / total if total else None}


def by_operation(changes: Sequence[Edit], found: Sequence[Scene]) -> dict[str, dict[str, float | None]]:
    """The figures of every operation, and of `all` edits together."""
    verdicts = [judge(change, seen) for change, seen in zip(changes, found)]
    figures = {name: summary([v for v, c in zip(verdicts, changes) if c.operation == name]) for name in OPERATIONS}
    return figures | {"all": summary(verdicts)}


def edit_pictures(system: Miniature, changes: Sequence[Edit], sources: np.ndarray, noise: Tensor,
                  reconstructions: np.ndarray, start: float) -> dict[str, np.ndarray]:
    """Edited pictures [N, 128, 128, 3] uint8 by decoder, all in `tree128` and from the noise of the scene.

    autoregressive, parallel  the edit decoder's embedding of (source, instruction)
    oracle                    the adapter's embedding of the true edited picture: the upper bound
    copy                      the unedited embedding, that is the reconstruction: the floor
    sdedit                    Flux from the source's latent with noise of time `start`, prompted with the exact caption
                              of the edited scene (which the edit decoder is never told), at guidance 2.5
    """
    source = system.embed(sources, "tree128")
    words = [change.instruction for change in changes]
    made = {mode: system.paint(system.edit(source, words, mode), "tree128", noise)
            for mode in ("autoregressive", "parallel")}
    targets = np.stack([render(change.target) for change in changes])
    made["oracle"] = system.paint(system.embed(targets, "tree128"), "tree128", noise)
    made["copy"] = reconstructions
    made["sdedit"] = sdedit(system, changes, sources, noise, start)
    return {name: made[name] for name in DECODERS}


def sdedit(system: Miniature, changes: Sequence[Edit], sources: np.ndarray, noise: Tensor, start: float) -> np.ndarray:
    prompts = [caption(change.target, fine=True) for change in changes]
    return system.paint_text(prompts, noise, system.latents(sources), start)


def trials(count: int) -> int:
    """Number of validation scenes for the choice of SDEdit's strength, for `count` test scenes."""
    return min(count, TRIALS)


def best_start(system: Miniature, count: int, seed: int) -> float:
    """SDEdit's best strength: the one of STARTS with the highest success + preservation on edits of validation
    scenes."""
    changes = instructions("validation", count, seed)
    sources = np.stack([render(change.source) for change in changes])
    noise = system.noise("validation", range(count), seed)

    def worth(start: float) -> float:
        figures = summary([judge(c, f)
                           for c, f in zip(changes, parse_all(sdedit(system, changes, sources, noise, start)))])
        return sum(value or 0.0 for value in figures.values())

    return max(STARTS, key=worth)
