"""The attention override by which Flux's own forward masks: core's hook in `transformer_options`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.attention import Regions, masked_attention
from ...kernels.blocks import Blocks
from .sequence import Sequence, to_front
from .watch import Watch, unfit_sentence

OVERRIDE_KEY = "optimized_attention_override"
READER_KEY = "sda_reader"
# Core's own exact attention functions; any other (SageAttention, flash, xformers) is the user's choice and is kept.
_EXACT = {"attention_pytorch", "attention_basic", "attention_split", "attention_sub_quad"}


def regional_attention(
    sequence: Sequence,
    previous: Callable | None,
    blocks: Blocks | None = None,
    watch: Watch | None = None,
    reader: Any = None,
) -> Callable:
    """An `optimized_attention_override` that masks the joint attention and calls `previous` for the attention itself.

    blocks: only in these; None for all, also where core does not say which block it is.
    watch: records every attention. Without one, an attention in which our tokens cannot be found is a ValueError.
    reader: of a source (`source_gate`) or of references (`reference_gate`), by gates, in the reader's own blocks.
    """

    def override(
        func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
    ):
        def host(q, k, v, **more):
            arguments = {"attn_precision": attn_precision, **more, **kwargs}
            if previous is None:
                return func(q, k, v, heads, **arguments)
            return previous(func, q, k, v, heads, **arguments)

        axis = 2 if skip_reshape else 1
        sizes = (q.shape[axis], k.shape[axis])
        fits = sequence.fits(*sizes)
        if mask is not None:  # which the conditioning brought along, for the sequence as core makes it
            fits = fits and sequence.before == 0 and sizes[0] == sizes[1] == mask.shape[-1]
        chosen = _among(blocks, kwargs.get("transformer_options"))
        reads = reader is not None and _among(reader.blocks, kwargs.get("transformer_options"))
        if chosen and watch is not None:
            watch.record_attention(None if fits else sizes)
        elif chosen and not fits:
            raise ValueError(unfit_sentence(*sizes, ""))
        if reads and (mask is not None or not fits):
            raise ValueError(unread_sentence(mask is not None))
        if reads and reader.watch is not None:
            reader.watch.record_attention(None)
        if not ((chosen or reads) and fits):
            return host(q, k, v, mask=mask, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
        if not skip_reshape:
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))

        def plain(q, k, v):
            # In the shape that Flux itself asks for, which every pack's override knows.
            return host(q, k, v, mask=None, skip_reshape=True).unflatten(-1, (heads, -1)).transpose(1, 2)

        regions, before = sequence.regions.first(len(q)), sequence.before  # companions may have left the batch
        if mask is not None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=_with_mask(regions, mask, q))
        else:
            keep = previous is not None or getattr(func, "__name__", "") not in _EXACT
            q, k, v = (to_front(t, before, regions.tokens) for t in (q, k, v))
            q, k, v, source = reader.read(q, k, v, sequence.text) if reads else (q, k, v, None)
            out = masked_attention(q, k, v, regions if chosen else None, plain=plain, keep_plain=keep, source=source)
            out = to_front(out, regions.tokens, before) if before else out
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    return override


def unread_sentence(masked: bool) -> str:
    if masked:
        return (
            "A gate cannot read beside the attention mask that a conditioning brings along: take Apply Style Model's multiply, "
            "or remove the gate."
        )
    return (
        "The gate does not find the picture in this model's attention, because another node changes its sequence: remove that "
        "node or the gate."
    )


def _among(blocks: Blocks | None, transformer_options: dict | None) -> bool:
    """Whether this attention is in one of the blocks. Core writes into the options which block it is in."""
    here = transformer_options or {}
    if blocks is None or not blocks:
        return blocks is None
    return "block_index" not in here or (here.get("block_type"), here["block_index"]) in blocks


def _with_mask(regions: Regions, mask: Tensor, q: Tensor) -> Tensor:
    """Our bias added to a mask of the whole sequence that the conditioning brought along (a style model's)."""
    mask = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask.float()
    while mask.ndim < 4:
        mask = mask.unsqueeze(0 if mask.ndim == 2 else 1)
    full = mask.expand(max(mask.shape[0], regions.batch), -1, regions.length, regions.length).clone()
    full[..., : regions.tokens] += regions.bias.unsqueeze(1)
    return full.to(q.dtype)
