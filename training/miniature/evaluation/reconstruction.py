"""Reconstruction: how much of a scene comes back when Flux paints it from an embedding (or from a text)."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..captions import caption
from ..parser import parse
from ..scenes import Scene, Thing
from ..score import colour_place, colour_position, distance, f1, matches, shape_place, strict
from .shape import iou
from .system import Miniature

PAINTED = 2  # pictures for each scene beside those of the variants: `caption`, and that of text_to_image


def parse_all(pictures: Sequence[np.ndarray]) -> list[Scene]:
    return [parse(picture) for picture in pictures]


def others(items: Sequence) -> list:
    """For every scene the item of another one: the next, and the first for the last."""
    return [*items[1:], items[0]]


def reconstruct(system: Miniature, scenes: Sequence[Scene], sources: np.ndarray,
                noise: Tensor) -> dict[str, np.ndarray]:
    """Pictures [N, 128, 128, 3] uint8 by name, from the same noise whatever the name.

    vae        the autoencoder's round trip: the ceiling
    caption    Flux from the exact caption, places as coordinates of 2 px: all that its language can say
    <variant>  Flux from the embedding of the picture (system.VARIANTS)
    shuffled   the control: the `tree128` picture of another scene (its embedding and its noise, which is independent of
               both scenes), scored as if it were this one's
    """
    made = {"vae": system.decode(system.latents(sources)),
            "caption": system.paint_text([caption(scene, fine=True) for scene in scenes], noise)}
    for name in system.variants:
        made[name] = system.paint(system.embed(sources, name), name, noise)
    return made | {"shuffled": np.stack(others(made["tree128"]))}


def text_to_image(system: Miniature, scenes: Sequence[Scene], noise: Tensor) -> dict[str, float]:
    """F1 of pictures painted from captions whose places are words (3 x 3): on colour and place, and with the shape."""
    found = parse_all(system.paint_text([caption(scene) for scene in scenes], noise))
    return {"f1_colour_place": f1(scenes, found, colour_place), "f1_shape": f1(scenes, found, shape_place)}


def measure(scenes: Sequence[Scene], found: Sequence[Scene], sources: np.ndarray,
            pictures: np.ndarray) -> dict[str, float | None]:
    """The figures of reconstructions that were parsed as `found`.

    f1                   objects with colour, shape and size right and the centre within 6 px (micro F1 over all scenes)
    f1_colour_position   objects with the colour right and the centre within 6 px
    position_px          mean distance between the centres of objects of the same colour and shape, however far apart
                         they are: nothing is cut off at 6 px; None where no object has its match
    background           share of scenes whose ground has the right colour
    iou                  mean overlap of the things that are there with their exact shapes (shape.iou)
    psnr                 mean over scenes of the PSNR in dB against the source picture, 8 bits
    """
    far = [distance(*pair) for truth, seen in zip(scenes, found) for pair in matches(truth, seen, same_name)]
    return {
        "f1": f1(scenes, found, strict),
        "f1_colour_position": f1(scenes, found, colour_position),
        "position_px": float(np.mean(far)) if far else None,
        "background": float(np.mean([truth.ground == seen.ground for truth, seen in zip(scenes, found)])),
        "iou": iou(scenes, pictures),
        "psnr": float(np.mean([psnr(a, b) for a, b in zip(sources, pictures)])),
    }


def same_name(a: Thing, b: Thing) -> bool:
    return a.name == b.name


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR of two uint8 pictures, in dB. Equal ones get 58.9: the error of rounding to 8 bits, 1/12, is the least
    possible."""
    error = np.square(a.astype(np.float32) - b).mean()
    return float(10 * np.log10(255 ** 2 / max(error, 1 / 12)))
