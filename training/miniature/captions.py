"""The miniature's language: captions that name each object with its place, and instructions with their exact result."""
from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...kernels.words import word_ids
from .scenes import (
    COLOURS,
    GROUNDS,
    PLACES,
    RADII,
    SHAPES,
    Scene,
    Thing,
    choice,
    is_free,
    new_thing,
    place_centre,
    random_position,
)

OPERATIONS = ("remove", "add", "recolour", "move", "replace")
STEP = 2  # pixels between two coordinate words

WORDS = ("a", "the", "at", "on", "ground", "remove", "add", "make", "move", "to", "replace", "with",
         *SHAPES, *COLOURS, *GROUNDS, *RADII, "top", "bottom", "left", "right", "center",
         *(str(n) for n in range(0, 128, STEP)))
VOCABULARY = ("<pad>", "</s>", "<unk>", *WORDS)
LENGTH = 56  # tokens after padding: the caption of a crowd of six fits
_IDS = {word: index for index, word in enumerate(VOCABULARY)}


def tokenize(text: str, length: int = LENGTH) -> list[int]:
    """Word ids, end mark, padding with id 0 up to `length`. Unknown words become id 2; a longer text is cut."""
    return word_ids(text, _IDS, length)


def where(x: float, y: float, place: str, fine: bool) -> str:
    if not fine:
        return f"at the {place}"
    return "at " + " ".join(str(int(min(126, STEP * round(v / STEP)))) for v in (x, y))


def describe(thing: Thing, fine: bool) -> str:
    return f"a {thing.size} {thing.name} {where(thing.x, thing.y, thing.place, fine)}"


def caption(scene: Scene, rng: np.random.Generator | None = None, fine: bool = False) -> str:
    """Every thing with its place (a word, or coordinates when `fine`), then the ground. `rng` shuffles the things."""
    order = range(len(scene.things)) if rng is None else rng.permutation(len(scene.things))
    parts = [describe(scene.things[i], fine) for i in order]
    return ", ".join([*parts, f"on a {scene.ground} ground"])


@dataclass(frozen=True)
class Edit:
    """An instruction, the scene it starts from and the scene it asks for. `subject` is the thing it names (None:
    add)."""

    operation: str
    instruction: str
    source: Scene
    target: Scene
    subject: Thing | None
    result: Thing | None


def _swap(scene: Scene, old: Thing, new: Thing | None) -> Scene:
    return replace(scene, things=tuple(n for n in (new if t == old else t for t in scene.things) if n is not None))


def _placed(rng, thing: Thing, others, fine: bool) -> Thing | None:
    """The thing at a new free position: anywhere when `fine`, else at the centre of a place."""
    if fine:
        position = random_position(rng, thing.radius, others)
        return None if position is None else replace(thing, x=position[0], y=position[1])
    options = [place_centre(p, thing.radius) for p in PLACES]
    options = [(x, y) for x, y in options if is_free(x, y, thing.radius, others)]
    if not options:
        return None
    x, y = choice(rng, options)
    return replace(thing, x=x, y=y)


def edit(scene: Scene, rng: np.random.Generator, operation: str | None = None, fine: bool = False) -> Edit:
    """A random instruction on the scene. An operation that finds no room or nothing to do becomes a recolouring; to an
    empty scene something is added."""
    operation = "add" if not scene.things else operation or choice(rng, OPERATIONS)
    names = {t.name for t in scene.things}
    old = choice(rng, scene.things) if scene.things else None
    others = tuple(t for t in scene.things if t != old)
    if operation == "remove":
        return Edit(operation, f"remove the {old.name}", scene, _swap(scene, old, None), old, None)
    if operation == "add":
        new = new_thing(rng, scene.things)
        new = new and _placed(rng, new, scene.things, fine)
        if new is not None and len(scene.things) < 3:
            text = f"add {describe(new, fine)}"
            return Edit(operation, text, scene, replace(scene, things=(*scene.things, new)), None, new)
    if operation == "move":
        new = _placed(rng, old, others, fine)
        if new is not None and new.place != old.place:
            text = f"move the {old.name} {where(new.x, new.y, new.place, fine).replace('at', 'to', 1)}"
            return Edit(operation, text, scene, _swap(scene, old, new), old, new)
    if operation == "replace":
        options = [(c, s) for c in COLOURS for s in SHAPES if s != old.shape and f"{c} {s}" not in names]
        colour, shape = choice(rng, options)
        new = replace(old, colour=colour, shape=shape)
        return Edit(operation, f"replace the {old.name} with a {new.name}", scene, _swap(scene, old, new), old, new)
    options = [c for c in COLOURS if c != old.colour and f"{c} {old.shape}" not in names]
    new = replace(old, colour=choice(rng, options))
    return Edit("recolour", f"make the {old.name} {new.colour}", scene, _swap(scene, old, new), old, new)
