"""Augmentation of edits: identity (nothing to do), and reversal (source and target swapped, instruction reversed).

Identity teaches what to leave alone: without it a decoder never sees an instruction that changes nothing. Reversal
doubles the instructions: a decoder that learns "add X" from a picture learns "remove X" from the same.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
# These instructions ask for no change. An instruction may be missing as well.
NOTHING = ("", "keep everything as it is", "do not change anything", "leave the picture as it is", "no change",
           "make no changes to the image")
_ADD = re.compile(r"(?:please )?(?:add|insert) (?P<what>.+)")
_REMOVE = re.compile(r"(?:please )?(?:remove|delete|erase|get rid of|take away) (?:the|an?|that|this) (?P<what>.+)")
_SWAP = re.compile(r"(?:please )?(?:replace|swap|substitute) (?:the |an? )?(?P<old>.+?) (?:with|for|by) (?:the |an? )?(?P<new>.+)")
_TURN = re.compile(r"(?:please )?(?:turn|change|transform|make) the (?P<old>.+?) into (?:the |an? )(?P<new>.+)")
_DETERMINER = re.compile(r"^(?:an?|the|some|another|one more) ")
_SEVERAL = re.compile(r"[,.;:]| and | then | but | instead|\b(?:it|them|its|their|his|her)\b")
_AFTER_NOUN = re.compile(r" (?:on|in|at|from|to|with|of|near|by|behind|under|over|above|below|beside|between|next|that|which|who"
                         r"|standing|sitting|holding|wearing|flying)\b")
_PLURALS = re.compile(r"(?:people|men|women|children|geese|mice|sheep|clothes|[a-z]*[^sui']s)$")


@dataclass(frozen=True)
class Augmentation:
    """Shares of the samples that are augmented, 0 to 1."""

    identity: float = 0.0
    """Samples whose target is their source."""
    reversed: float = 0.0
    """Samples that are reversed, where the instruction can be."""

    def __post_init__(self):
        if not (0 <= self.identity and 0 <= self.reversed and self.identity + self.reversed <= 1):
            raise ValueError(f"identity {self.identity} and reversed {self.reversed} are shares of the samples; they "
                             f"add up to at most 1.")

    def kind(self, draw: float) -> str:
        """"identity", "reversed" or "plain", for a number drawn uniformly from [0, 1)."""
        return "identity" if draw < self.identity else "reversed" if draw < self.identity + self.reversed else "plain"


def reverse_instruction(text: str) -> str | None:
    """The instruction that undoes this one, where a plain rule can tell: an added thing is removed, a removed thing is
    added, and a replacement is reversed. None for everything else, and where several things are asked for."""
    text = " ".join(text.lower().split()).rstrip(".! ")
    if _SEVERAL.search(text):
        return None
    if found := _ADD.fullmatch(text):
        return "remove the " + re.sub(r" to the ", " from the ", _DETERMINER.sub("", found["what"], count=1), count=1)
    if found := _REMOVE.fullmatch(text):
        return "add " + re.sub(r" from the ", " to the ", _with_article(found["what"]), count=1)
    if found := _SWAP.fullmatch(text):
        return f"replace the {found['new']} with {_with_article(found['old'])}"
    if found := _TURN.fullmatch(text):
        return f"turn the {found['new']} into {_with_article(found['old'])}"
    return None


def _with_article(thing: str) -> str:
    noun = _AFTER_NOUN.split(thing, maxsplit=1)[0]
    if _PLURALS.search(noun):
        return thing
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def augmented(sample: tuple[T, T, str], draw: float, word: float, shares: Augmentation) -> tuple[T, T, str]:
    """(source, target, instruction): plain, identity, or reversed.

    draw, word: uniform in [0, 1). `word` picks the text that asks for nothing. A sample that cannot be reversed stays
    as it is.
    """
    source, target, text = sample
    kind = shares.kind(draw)
    if kind == "identity":
        return source, source, NOTHING[int(word * len(NOTHING))]
    back = reverse_instruction(text) if kind == "reversed" else None
    return sample if back is None else (target, source, back)
