"""The words of a prompt as tokens of the text space, without the padding that follows them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

PAD = 0  # of every T5


def words(clip: Any, text: str) -> tuple[Tensor, Tensor]:
    """(tokens [1, N, D] of the words and the end mark, pooled [1, P]) of a prompt, by the model's own CLIP.

    Flux reads a prompt with its padding; a region does without, so that ten regions do not cost ten times 256 tokens.
    ValueError for an empty prompt and for a CLIP that has no T5 or nothing else.
    """
    check(text)
    tokens = clip.tokenize(text)
    name = next((key for key in tokens if key.startswith("t5")), None)
    if name is None:
        raise ValueError("This CLIP has no T5, so it is not a Flux model's: load it with DualCLIPLoader, type flux.")
    encoded, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    if pooled is None:
        raise ValueError("This CLIP is a T5 alone, and Flux reads CLIP-L beside it: load both with DualCLIPLoader, type flux.")
    # An id that is no number is an embedding that the prompt named: a word like any other.
    ids = [entry[0] for section in tokens[name] for entry in section]
    last = max(index for index, id in enumerate(ids) if not isinstance(id, int) or id != PAD)
    return encoded[:, : last + 1], pooled


def check(text: str) -> None:
    if not text.strip():
        raise ValueError("The prompt of a region is empty: write what the region shows.")
