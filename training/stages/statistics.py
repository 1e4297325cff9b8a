"""`sda statistics`: a file of 32 KB with the statistics of FLUX.1's T5 outputs. It replaces the encoder's 9.5 GB.

Without a prepared set it reads the prompts of `frozen/text_statistics.py`, so that anyone gets the same file from the
same encoder.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from ...kernels.replace import replacing
from ..data.index import Index
from ..frozen.base import base_sha256
from ..frozen.text import encoder_place
from ..frozen.text_statistics import is_statistics, text_statistics
from .held_out import captions_of


@dataclass(frozen=True)
class Config:
    text: Path
    """FLUX.1's T5: the folder of FLUX.1-dev, its text_encoder_2, or ComfyUI's t5xxl_fp16.safetensors beside a
    tokenizer."""
    to: Path = Path("text_statistics.safetensors")
    """The file to write; give it to a training as base.text."""
    data: str = ""
    """A prepared set whose captions are read."""


def run(config: Config) -> bool:
    """Read the texts once and write the file."""
    if is_statistics(config.text):
        raise ValueError(f"{config.text} holds statistics already; give a training that file as base.text.")
    captions = captions_of(Index.read(config.data)) if config.data else []
    mean, deviation = text_statistics(config.text, captions)
    with replacing(config.to) as temporary:
        # The metadata is one entry, because safetensors writes several in any order.
        source = {"text_encoder_sha256": base_sha256(encoder_place(config.text)), "captions": len(captions),
                  "data": config.data}
        save_file({"text_mean": mean, "text_std": deviation}, temporary, metadata={"source": json.dumps(source)})
    print(f"{config.to}: {len(mean)} channels, means {mean.min():.3f} to {mean.max():.3f}, deviations "
          f"{deviation.min():.3f} to {deviation.max():.3f}")
    return True
