"""Where the outputs of a CLIP's T5 lie, by texts that it encodes once."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ...kernels.text_space import PROMPTS, TextSpace

_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # CLIP -> TextSpace


def text_space(clip: Any, words) -> TextSpace:
    """The space of a CLIP. words(clip, text) -> (tokens [1, N, D] without padding, pooled)."""
    if clip not in _known:
        with torch.no_grad():
            _known[clip] = TextSpace.of(words(clip, text)[0][0] for text in PROMPTS)
    return _known[clip]
