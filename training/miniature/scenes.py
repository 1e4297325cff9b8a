"""Procedural scenes with exact ground truth: coloured shapes at continuous positions on a plain ground.

A scene is a pure function of (split, index), so train, validation and test never meet and nothing has to be stored.
Coordinates are pixels of the 128 x 128 image, x to the right, y down; a shape of radius r fits the circle of radius r.
"""
from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

SIZE = 128
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 70), "blue": (50, 80, 220),
    "yellow": (240, 210, 40), "purple": (160, 60, 200), "cyan": (60, 205, 225),
}
GROUNDS = {"white": (244, 244, 244), "grey": (150, 150, 150), "black": (24, 24, 24), "brown": (112, 76, 50)}
RADII = {"small": 15.0, "large": 22.0}
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
SPLITS = {"train": 0, "validation": 1, "test": 2, "crowd_train": 3, "crowd_validation": 4, "crowd_test": 5}
GAP = 4.0     # pixels kept free between two shapes
MARGIN = 2.0  # pixels kept free at the border


@dataclass(frozen=True)
class Thing:
    """One shape: names from SHAPES, COLOURS and RADII, centre in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def radius(self) -> float:
        return RADII[self.size]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        return place_of(self.x, self.y)


@dataclass(frozen=True)
class Scene:
    """Things in drawing order on a ground from GROUNDS. No two things share colour and shape."""

    ground: str
    things: tuple[Thing, ...]

    def to_json(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_json(data: dict) -> Scene:
        return Scene(data["ground"], tuple(Thing(**thing) for thing in data["things"]))


def place_of(x: float, y: float) -> str:
    """The word for the cell of a 3 x 3 grid that holds the point."""
    column, row = (min(2, max(0, int(3 * v / SIZE))) for v in (x, y))
    return PLACES[3 * row + column]


def place_centre(place: str, radius: float) -> tuple[float, float]:
    """Where a thing of this radius is put when only the place word is known: the cell's centre, inside the border."""
    row, column = divmod(PLACES.index(place), 3)
    low, high = radius + MARGIN, SIZE - radius - MARGIN
    return tuple(float(np.clip((k + 0.5) * SIZE / 3, low, high)) for k in (column, row))


def generator(split: str, index: int, purpose: int = 0, seed: int = 0) -> np.random.Generator:
    """The random stream of one sample. `seed` makes fresh scenes of a split; `purpose` separates independent draws."""
    return np.random.default_rng([SPLITS[split], seed, index, purpose])


def is_free(x: float, y: float, radius: float, others) -> bool:
    return all(np.hypot(x - o.x, y - o.y) >= radius + o.radius + GAP for o in others)


def random_position(rng: np.random.Generator, radius: float, others, tries: int = 60) -> tuple[float, float] | None:
    low, high = radius + MARGIN, SIZE - radius - MARGIN
    for _ in range(tries):
        x, y = rng.uniform(low, high, 2)
        if is_free(x, y, radius, others):
            return round(float(x), 2), round(float(y), 2)
    return None


def numbered(number: int, scenes: int) -> tuple[str, int]:
    """(split, index) of training scene `number` among `scenes` ordinary ones, after which come the crowds."""
    return ("train", number) if number < scenes else ("crowd_train", number - scenes)


def choice(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def new_thing(rng: np.random.Generator, others, sizes: tuple[str, ...] = tuple(RADII)) -> Thing | None:
    """A thing that fits beside the others and differs from each in colour or shape; None when there is no room."""
    names = {o.name for o in others}
    while True:
        shape, colour, size = choice(rng, SHAPES), choice(rng, tuple(COLOURS)), choice(rng, sizes)
        if f"{colour} {shape}" not in names:
            break
    position = random_position(rng, RADII[size], others)
    return None if position is None else Thing(shape, colour, size, *position)


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """Scene number `index` of a split: 1 to 3 things, or 4 to 6 small ones in a crowd."""
    rng, crowd = generator(split, index, seed=seed), split.startswith("crowd")
    count, things = int(rng.integers(*((4, 7) if crowd else (1, 4)))), []
    for _ in range(count):
        thing = new_thing(rng, things, ("small",) if crowd else tuple(RADII))
        if thing is not None:
            things.append(thing)
    return Scene(choice(rng, tuple(GROUNDS)), tuple(things))


def distance_field(shape: str, radius: float, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Signed distance in pixels (negative inside; exact enough near the edge for anti-aliasing) at offsets from the
    centre."""
    if shape == "circle":
        return np.hypot(dx, dy) - 0.9 * radius
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) - 0.78 * radius
    if shape == "triangle":  # equilateral, apex up, its three vertices on the circle
        return np.maximum(dy - 0.5 * radius, 0.8660254 * abs(dx) - 0.5 * dy - 0.5 * radius)
    if shape == "cross":
        arm, long = 0.3 * radius, 0.95 * radius
        return np.minimum(np.maximum(abs(dx) - arm, abs(dy) - long), np.maximum(abs(dx) - long, abs(dy) - arm))
    raise ValueError(f"Unknown shape '{shape}'; the miniature knows {', '.join(SHAPES)}.")


def coverage(thing: Thing) -> np.ndarray:
    """How much of each pixel the thing covers: [128, 128] float32 in [0, 1]."""
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    field = distance_field(thing.shape, thing.radius, axis[None, :] - thing.x, axis[:, None] - thing.y)
    return np.clip(0.5 - field, 0, 1)


def render(scene: Scene) -> np.ndarray:
    """The picture: [128, 128, 3] uint8 RGB."""
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = GROUNDS[scene.ground]
    for thing in scene.things:
        alpha = coverage(thing)[..., None]
        image += alpha * (np.asarray(COLOURS[thing.colour], np.float32) - image)
    return np.rint(image).astype(np.uint8)
