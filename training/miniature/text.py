"""The miniature's text encoder: a small T5 over words, padded to a fixed length that nothing masks, as in Flux."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from ...kernels import checkpoint
from ..frozen.text import load_word_encoder
from .captions import LENGTH, VOCABULARY, tokenize

ARCHITECTURE = dict(vocab_size=len(VOCABULARY), d_model=192, d_kv=48, d_ff=512, num_layers=4, num_heads=4,
                    relative_attention_num_buckets=32, feed_forward_proj="gated-gelu", dropout_rate=0.0,
                    pad_token_id=0, eos_token_id=1)


def build_text_encoder(architecture: dict = ARCHITECTURE) -> T5EncoderModel:
    """A T5 encoder whose number words start as waves of their number, so that near coordinates start out near. As
    sixty-four unrelated words each would have to be learnt alone."""
    encoder = T5EncoderModel(T5Config(**architecture))
    numbers = [n for n, word in enumerate(VOCABULARY) if word.isdigit()]
    with torch.no_grad():
        encoder.shared.weight[numbers] = waves([float(VOCABULARY[n]) for n in numbers], encoder.config.d_model)
    return encoder


def waves(pixels: list[float], width: int) -> Tensor:
    """[N, width] of unit variance: sines and cosines of coordinates, mixed at random. The slow frequencies are those of
    Flux's rotary positions (16 pixels to a patch), so that its attention finds a place by a linear map of its words."""
    frequencies = torch.cat([torch.tensor([8.0, 4.0, 2.0]), 10_000 ** (-torch.arange(5) / 14)]) / 16
    angles = torch.tensor(pixels)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1) @ torch.randn(16, width) / 8 ** 0.5


def token_ids(texts: list[str], device=None) -> Tensor:
    """[B, LENGTH] int64."""
    return torch.tensor([tokenize(t) for t in texts], device=device)


def encode(encoder: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids [B, L] -> (context [B, L, D], pooled [B, D]: the mean over the words and the end mark)."""
    # An explicit mask of ones: without it some versions of transformers mask the pads on their own.
    context = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    real = (ids != 0).to(context.dtype)[..., None]
    return context, (context * real).sum(1) / real.sum(1)


def save_text_encoder(path: Path, encoder: nn.Module, step: int) -> None:
    checkpoint.save(path, encoder.state_dict(), kind="text_encoder", dtype=torch.int8, step=step,
                    config={"t5": ARCHITECTURE, "vocabulary": list(VOCABULARY), "length": LENGTH})


def load_text_encoder(path: Path, device: torch.device) -> T5EncoderModel:
    encoder, record = load_word_encoder(path, device)
    if record["config"]["vocabulary"] != list(VOCABULARY):
        raise ValueError(f"{path} was trained on another vocabulary; train the base again with `sda miniature base`.")
    return encoder
