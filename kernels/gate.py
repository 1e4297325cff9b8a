"""How strongly each query reads a source: closed where the picture is to change, open where it is to stay.

g = strength * smoothstep(similarity; lo, hi) for a latent patch, similarity = 1 - change map. The text is read by every
patch, so it has a gate too, or the source would pass through it into patches that are closed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention.source import STRONGEST


def gate(change: Tensor, strength: float, lo: float, hi: float) -> Tensor:
    """Change [B, rows, cols] in 0..1 (a change map or a mask: 1 = may change) -> gates of the patches, 0..2, float32.

    Exactly 0 where the similarity is lo or less, exactly `strength` where it is hi or more.
    """
    if not 0 <= strength <= STRONGEST:
        raise ValueError(f"The strength of a gate lies between 0 and {STRONGEST:g}, not {strength:g}.")
    if not 0 <= lo < hi <= 1:
        raise ValueError(f"A gate opens from lo to hi with 0 <= lo < hi <= 1, not from {lo:g} to {hi:g}.")
    similarity = 1 - change.float()
    part = ((similarity - lo) / (hi - lo)).clamp(0, 1)
    part = part.masked_fill(similarity <= lo, 0).masked_fill(similarity >= hi, 1)  # rounding would miss the ends
    return strength * part * part * (3 - 2 * part)


def sequence_gate(patches: Tensor, text: int, text_gate: float, references: int = 0) -> Tensor:
    """[B, rows, cols] -> [B, S] for the sequence [text; patches; references]; references read no source."""
    if not 0 <= text_gate <= STRONGEST:
        raise ValueError(f"The gate of the text lies between 0 and {STRONGEST:g}, not {text_gate:g}.")
    batch = patches.shape[0]
    before = patches.new_full((batch, text), text_gate)
    return torch.cat([before, patches.flatten(1), patches.new_zeros((batch, references))], dim=1)


def reference_gate(patches: Tensor, text: int, text_gate: float, references: int) -> Tensor:
    """`sequence_gate` of a source that is the sequence's own references: they read one another, and the rest, as ever."""
    gates = sequence_gate(patches, text, text_gate, references)
    gates[:, text + patches[0].numel() :] = 1
    return gates
