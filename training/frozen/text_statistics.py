"""Mean and deviation, by channel, of Flux's T5 outputs for real prompts. The adapter's output starts out there."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...kernels import checkpoint, header
from ...kernels.precision import frozen_dtype
from ...kernels.text_space import PROMPTS, TextSpace
from .text import load_t5, load_tokenizer, t5_width

ENOUGH = 64  # texts; a set with fewer captions is filled up with PROMPTS


def is_statistics(path: Path) -> bool:
    """Whether a path is a file that holds statistics, of `sda statistics` or an exported adapter's, and not a text
    encoder."""
    return path.is_file() and {"text_mean", "text_std"} <= header.read(path).tensors.keys()


def check_statistics(path: Path, width: int) -> None:
    """Refuse what `text_statistics` cannot take for a base that reads texts of `width` channels. Only a tokenizer is
    loaded. ValueError."""
    if is_statistics(path):
        found = header.read(path).tensors["text_mean"].shape[-1]
    else:
        found = t5_width(path)
        load_tokenizer(path, 2**31)
    if found != width:
        raise ValueError(f"{path} has texts of {found} channels and the base reads {width}; give the statistics, or "
                         f"the text encoder, of this base.")


def text_statistics(path: Path, captions: list[str]) -> tuple[Tensor, Tensor]:
    """(mean [D], deviation [D]) float32 of the text encoder's outputs, on the CPU.

    path: a safetensors file that holds them as `text_mean` and `text_std`; or FLUX.1's T5 (`text.load_t5`), which reads
        the captions, and PROMPTS beside them where there are fewer than ENOUGH. Padding does not count. T5 runs on the
        CPU: it would take 9.5 GB of a card that has yet to hold the base.
    """
    if is_statistics(path):
        tensors = checkpoint.load(path, "adapter")[0] if checkpoint.has_record(path) else checkpoint.load_tensors(path)
        return tensors["text_mean"].float(), tensors["text_std"].float()
    encoder = load_t5(path, frozen_dtype(torch.device("cpu"))).eval()
    tokenizer = load_tokenizer(path, encoder.config.vocab_size)

    @torch.no_grad()
    def read(text: str) -> Tensor:
        ids = tokenizer(text, truncation=True, max_length=512, return_tensors="pt").input_ids
        return encoder(input_ids=ids).last_hidden_state[0]

    space = TextSpace.of(map(read, captions if len(captions) >= ENOUGH else [*captions, *PROMPTS]))
    return space.mean, space.deviation
