"""Networks of ours from their files: vision encoders, adapters and edit decoders."""

from __future__ import annotations

from pathlib import Path

from ...kernels import checkpoint
from ...kernels.adapter import read_adapter
from ...kernels.edit_decoder import read_edit_decoder
from ...kernels.vision.known import KNOWN_TOWERS
from ...kernels.vision.towers import load_tower, load_tower_file
from .memory import Network, hold


def load_vision_tower(path: str, model: str | None) -> Network:
    """A vision encoder. `model`: the id of a known public encoder, or None if the file carries our record."""
    if model is None:
        if not checkpoint.has_record(path):
            raise ValueError(
                f"{Path(path).name} does not say which encoder it is: choose its model in the widget below the file."
            )
        tower, record = load_tower_file(path)
    else:
        tower, record = load_tower(KNOWN_TOWERS[model], checkpoint.load_parts(path)), {}
    return hold(tower, path, record)


def load_adapter(path: str) -> Network:
    adapter, record = read_adapter(path)
    return hold(adapter, path, record)


def load_edit_decoder(path: str) -> Network:
    decoder, record = read_edit_decoder(path)
    return hold(decoder, path, record)
