"""The latent of a source picture, as the nodes that compare with it or start from it take it."""

from __future__ import annotations

import comfy.model_sampling
from torch import Tensor


def source_of(latent: dict) -> tuple[Tensor, list[int]]:
    """(LATENT's samples [B, C, H, W], each picture's number in the batch that it comes from)."""
    samples = latent["samples"]
    if samples.ndim != 4:
        raise ValueError(f"The source's latent must be of still pictures, not of shape {list(samples.shape)}.")
    if not samples.any():
        raise ValueError("The source's latent is empty: connect VAE Encode of the source picture.")
    return samples, list(latent.get("batch_index", range(len(samples))))


def check_flow(model, what: str) -> None:
    """ValueError unless the model is sampled as a flow, where x = (1 - s) source + s noise."""
    if not isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST):
        raise ValueError(
            f"{what} needs a flow model such as FLUX.1, sampled as it was trained: connect it from before the node that "
            "replaced its sampling."
        )
