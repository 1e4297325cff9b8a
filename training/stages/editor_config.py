"""The tables of `sda train editor`, what is refused of them before anything loads, and the decoder that they ask for."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ...kernels import checkpoint
from ...kernels.adapter import AdapterConfig
from ...kernels.edit_decoder import (
    EditDecoder,
    LLMEditDecoder,
    LLMEditDecoderConfig,
    T5EditDecoder,
    T5EditDecoderConfig,
    build_edit_decoder,
    read_config,
)
from ...kernels.edit_decoder.llm import llm_record
from ..adapter import named_hierarchy
from ..base import Precision, check_precision
from ..data.index import Index
from ..instructions import LENGTH, TextPrecision
from ..lora import add_lora, load_llm


@dataclass(frozen=True)
class Edits:
    index: str
    """The folder that `sda prepare-edits` filled: a path, or an address of an object store."""
    resolutions: tuple[int, ...] = (512,)
    """In pixels, each with equal share of the steps; validation takes the first."""
    validation: int = 256
    """About how many samples are held out: whole source pictures, by their hash."""
    threads: int = 8
    """That read and decode pictures, in each process."""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """What to do where a prepared sample can no longer be read: stop, or take another of its bucket."""


@dataclass(frozen=True)
class Vision:
    files: tuple[Path, ...]
    """Of the vision towers that the adapter looks through."""
    ids: tuple[str, ...] = ()
    """For each file the id of a published encoder, "" where the file says it itself; leave out where all do."""


@dataclass(frozen=True)
class Text:
    path: Path
    """Flux's T5: the folder of FLUX.1-dev, its text_encoder_2, or ComfyUI's t5xxl_fp16.safetensors."""
    tokenizer: Path | None = None
    """The folder of its tokenizer, where it does not lie beside it."""
    length: int = LENGTH
    """Tokens of an instruction with its padding: ComfyUI pads to 256."""
    precision: TextPrecision = "bf16"


@dataclass(frozen=True)
class Base:
    path: Path | None = None
    """FLUX.1 as a single file or a diffusers folder, the one that the adapter was trained through."""
    vae: Path | None = None
    precision: Precision = "bf16"


@dataclass(frozen=True)
class Decoder:
    architecture: Literal["t5", "causal_lm"] = "t5"
    """A T5 decoder, made anew, which writes in one pass and token by token; or a trained causal LLM, in one pass."""
    width: int = 1024
    """Of a T5."""
    heads: int = 16
    layers: int = 12
    llm: Path | None = None
    """The folder of a causal LLM (config.json and safetensors), such as Qwen3's base models."""
    start: Path | None = None
    """An edit decoder's file to go on from, for the same adapter: what an earlier run exported. Its sizes are its own."""
    lora_rank: int = 64
    """Of the LoRA on the LLM, which is frozen; 0 trains the whole LLM."""
    lora_alpha: float = 64.0
    checkpointing: bool = False
    """Compute each block again in the backward instead of keeping its activations."""


def check(config) -> None:
    """Raise ValueError for what cannot work, before anything is loaded."""
    decoder, base = config.decoder, config.base
    if decoder.llm and (decoder.architecture == "t5" or decoder.start):
        raise ValueError("decoder.llm is given for a T5; set decoder.architecture to causal_lm, or leave the LLM out."
                         if decoder.architecture == "t5" else "decoder.start has an LLM of its own; leave decoder.llm out.")
    if decoder.architecture == "causal_lm" and not (decoder.llm or decoder.start):
        raise ValueError("decoder.llm is missing: give the folder of a causal LLM such as Qwen3.")
    if config.flow.weight and (base.path is None or base.vae is None):
        raise ValueError("flow.weight asks for training through Flux; give base.path and base.vae, or set it to 0.")
    if config.flow.weight:
        check_precision(base.precision)
    if not config.presets or not config.data.resolutions:
        raise ValueError("presets and data.resolutions must each name at least one.")
    for preset in config.presets:
        named_hierarchy(preset)


def held_out(index: Index, count: int) -> tuple[Index, Index]:
    """(samples to train on, about `count` samples to validate on). They are told apart by the hash of their source picture, so
    all edits of one picture lie on one side, and preparing more pictures moves few."""
    if index.kind != "edits":
        raise ValueError(f"{index.url} holds pictures, not edits; prepare the edits with `sda prepare-edits`.")
    if not 0 <= count <= len(index) // 2:
        raise ValueError(f"{count} of {len(index)} samples cannot be held out; set data.validation to at most {len(index) // 2}.")
    codes = np.array([int.from_bytes(digest[:8], "big") for digest in index.table.column("sha256").to_pylist()], np.uint64)
    kept = codes < np.sort(codes)[count]
    return Index(index.url, index.table.filter(~kept)), Index(index.url, index.table.filter(kept))


def new_decoder(settings: Decoder, adapter: AdapterConfig, text_dim: int, dtype: torch.dtype) -> EditDecoder:
    """The decoder of the adapter's embeddings before its training, frozen where it does not learn; dtype: of a frozen LLM."""
    space = adapter.out_dim, text_dim, adapter.hierarchy
    if settings.start:
        decoder = read_decoder(settings, space)
    elif settings.architecture == "t5":
        decoder = T5EditDecoder(T5EditDecoderConfig(*space, settings.width, settings.heads, settings.layers))
    else:
        llm = load_llm(settings.llm, torch.float32)
        decoder = LLMEditDecoder(LLMEditDecoderConfig(*space, llm_record(llm.config)), llm)
    stack = decoder.stack if settings.architecture == "t5" else decoder.llm
    if settings.architecture == "causal_lm" and settings.lora_rank:
        stack.to(dtype)
        add_lora(decoder, settings.lora_rank, settings.lora_alpha)
    if settings.checkpointing:
        stack.gradient_checkpointing_enable({"use_reentrant": False})
    return decoder


def read_decoder(settings: Decoder, space: tuple) -> EditDecoder:
    """The decoder in `settings.start`. ValueError where it is of another architecture or space (dim, text_dim, hierarchy)."""
    tensors, record = checkpoint.load(settings.start, "edit_decoder")
    config = read_config(record["config"])
    if config.architecture != settings.architecture:
        raise ValueError(f"{settings.start} is a {config.architecture} and decoder.architecture says {settings.architecture}; "
                         "make them the same.")
    if (config.dim, config.text_dim, config.hierarchy) != space:
        raise ValueError(f"{settings.start} was made for another adapter or text encoder; start from one of this adapter.")
    decoder = build_edit_decoder(config)
    checkpoint.fill(decoder, {name: tensor.float() for name, tensor in tensors.items()}, settings.start)
    return decoder
