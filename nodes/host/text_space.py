"""Where the outputs of a CLIP's T5 lie, by texts that it encodes once."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ...kernels.text_space import TextSpace

# Captions of many kinds. The statistics are of their words, so that plain words are enough.
TEXTS = (
    "a red circle at the top left and a large blue square at the bottom on a white ground",
    "a small green triangle at the center and a yellow cross on the right on a grey ground",
    "a photo of an old man with a beard, soft light from the left, blurred background",
    "two children playing with a dog on a beach at sunset",
    "a watercolour of a village by a lake, mountains behind it, clouds in the sky",
    "a wooden table with a bowl of fruit, a glass of water and a folded newspaper",
    "a black car parked in front of a brick house, snow on the street",
    "the inside of a library, tall shelves, a ladder, warm lamps",
    "a close-up of a purple flower with drops of rain",
    "a city street at night, neon signs, people with umbrellas, wet asphalt",
    "a cat sleeping on a green sofa next to a brown cushion",
    "an astronaut riding a white horse across a field, digital art",
)

_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # CLIP -> TextSpace


def text_space(clip: Any, words) -> TextSpace:
    """The space of a CLIP. words(clip, text) -> (tokens [1, N, D] without padding, pooled)."""
    if clip not in _known:
        with torch.no_grad():
            _known[clip] = TextSpace.of(words(clip, text)[0][0] for text in TEXTS)
    return _known[clip]
