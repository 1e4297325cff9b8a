"""The miniature's tokenizer: lower-case words and numbers, each one id, then an end mark, then padding.

Training and nodes cut text the same way; the vocabulary and the length stand in the text encoder's record.
"""
from __future__ import annotations

import re
from collections.abc import Mapping

PAD, END, UNKNOWN = 0, 1, 2
_WORD = re.compile(r"[a-z]+|[0-9]+")


def split(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def word_ids(text: str, ids: Mapping[str, int], length: int) -> list[int]:
    """`length` ids of a text by the table `ids`; a word outside it is UNKNOWN, a longer text is cut before its end
    mark."""
    found = [ids.get(word, UNKNOWN) for word in split(text)][: length - 1] + [END]
    return found + [PAD] * (length - len(found))
