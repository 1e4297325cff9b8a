"""Where in Flux's joint sequence the region tokens are, and the regions of the sequence as it then is.

Flux attends over `[text ; image patches ; references]`, and the text begins with the region tokens. Core's `post_input`
patches change that inside the forward: USO Style Reference puts tokens before the text, FluxKVCache removes the
references whose keys it has kept. So for one forward two patches of ours stand around those of others. Comparing the
sequence before and after tells where our tokens went.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.attention import Regions


class Sequence:
    """The joint sequence of one forward.

    make(text, references) -> the Regions of a sequence that begins with the region tokens, by the numbers of its text
        tokens (region tokens among them) and of whatever follows the patches.
    text, patches, references: the sequence as core makes it.
    """

    def __init__(self, make: Callable[[int, int], Regions], text: int, patches: int, references: int) -> None:
        self._make, self._own, self._patches, self._references = make, text, patches, references
        self._entered: Tensor | None = None
        self.text, self.image = text, patches + references
        self.before: int | None = 0  # tokens before ours; None where ours are not to be found
        self.regions = make(text, references)  # of the sequence as it is now, the region tokens brought to its front

    def fits(self, queries: int, keys: int) -> bool:
        """Whether an attention of so many queries and keys is the joint one, with our tokens where we know them to be.

        Keys may go on after the queries: those of the references that were taken away.
        """
        kept = self.text + self._patches + self._references
        known = self.before is not None and self.image >= self._patches
        return known and queries == self.text + self.image and keys in (queries, kept)

    def follow(self, transformer_options: dict) -> dict:
        """transformer_options under which the patches of others are followed; as they were where there are none."""
        patches = transformer_options.get("patches", {})
        if not patches.get("post_input"):
            return transformer_options
        around = [self._enter, *patches["post_input"], self._leave]
        return {**transformer_options, "patches": {**patches, "post_input": around}}

    def _enter(self, arguments: dict) -> dict:
        self._entered = arguments["txt"]
        return arguments

    def _leave(self, arguments: dict) -> dict:
        entered, left = self._entered, arguments["txt"]
        self._entered, self.before = None, None
        if entered.shape[1] == self._own:  # else somebody changed the text before this, and ours cannot be known
            self.before = _find(entered[:, : self.regions.tokens], left, entered.shape[1] == left.shape[1])
        self.text, self.image = left.shape[1], arguments["img"].shape[1]
        rest = self.image - self._patches
        if self.before is not None and rest >= 0 and self.regions.length != self.text + self.image:
            self.regions = self._make(self.text, rest)
        return arguments


def to_front(sequence: Tensor, start: int, count: int) -> Tensor:
    """[B, H, S, d] with the `count` tokens from `start` on moved to its front. (count, start) moves them back."""
    if start == 0:
        return sequence
    end = start + count
    return torch.cat([sequence[:, :, start:end], sequence[:, :, :start], sequence[:, :, end:]], dim=2)


def _find(ours: Tensor, text: Tensor, as_long: bool) -> int | None:
    """Where `ours` [B, T, C] stands in `text` [B, S, C], value by value; None where it does not, or more than once.

    A text of the old length without them was changed in place.
    """
    if ours.shape[0] != text.shape[0] or ours.shape[1] > text.shape[1]:
        return None
    count = ours.shape[1]
    starts = (text[:, : text.shape[1] - count + 1] == ours[:, :1]).all(-1).all(0).nonzero().flatten().tolist()
    found = [start for start in starts if torch.equal(text[:, start : start + count], ours)]
    if as_long and (not found or 0 in found):
        return 0
    return found[0] if len(found) == 1 else None
