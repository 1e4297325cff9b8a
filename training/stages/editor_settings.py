"""Settings of `sda train editor`, the checks before anything is loaded, and the decoder they describe."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ...kernels.edit_decoder import (
    EditDecoder,
    LLMEditDecoder,
    LLMEditDecoderConfig,
    T5EditDecoder,
    T5EditDecoderConfig,
)
from ...kernels.edit_decoder.llm_record import llm_record
from ..config import RunConfig, free
from ..engine import World
from ..engine.lock import check_folder
from ..files import outline
from ..frozen.base import Precision, skeleton
from ..frozen.encoders import vae_of
from ..frozen.text import LENGTH, TextPrecision
from ..objectives.augmentation import Augmentation
from ..objectives.edit import EditorTraining, load_editor
from ..objectives.edit_flow import FlowTraining
from ..objectives.lora import add_lora, load_llm
from ..objectives.reconstruct import named_hierarchy
from .settings import Data, Vision, check_base, check_data, check_files


@dataclass(frozen=True)
class Text:
    path: Path
    """Flux's T5: the folder of FLUX.1-dev, its text_encoder_2, or ComfyUI's t5xxl_fp16.safetensors."""
    tokenizer: Path | None = None
    """The folder of its tokenizer, where it is not beside it."""
    length: int = LENGTH
    """Tokens of an instruction, padding included. ComfyUI pads to 256."""
    precision: TextPrecision = "auto"


@dataclass(frozen=True)
class Decoder:
    architecture: Literal["t5", "causal_lm"] = "t5"
    """A new T5 decoder writes in one pass and token by token; a trained causal LLM writes in one pass."""
    width: int = 1024
    """Width of a new T5 decoder. `heads` and `layers` are its too."""
    heads: int = 16
    layers: int = 12
    llm: Path | None = None
    """The folder of a causal LLM (config.json and safetensors), such as Qwen3's base models."""
    start: Path | None = None
    """An exported edit decoder to continue from, for the same adapter. Its file gives the sizes."""
    lora_rank: int = 64
    """Rank of the LoRA on the LLM, which is frozen. 0 trains the whole LLM."""
    lora_alpha: float = 64.0
    checkpointing: bool = free(False)
    """Compute each block again in the backward pass instead of keeping its activations."""


@dataclass(frozen=True)
class Flux:
    """The frozen base; only `flow` needs it."""

    flux: Path | None = None
    """FLUX.1 as a single file or a diffusers folder: the base that the adapter was trained through."""
    vae: Path | None = None
    precision: Precision = "auto"
    sharded: bool = free(False)
    """Shard the base over the processes of each machine. Otherwise it is replicated."""
    checkpointing: bool = free(True)
    """Compute each block of Flux again in the backward pass instead of keeping its activations."""


@dataclass(frozen=True)
class Validation:
    preset: str = free("tree128")
    resolution: int = 512
    """Resolution of the held-out edits, in pixels. They are chosen among those that fill it."""
    pictures: int = free(4)
    """How many of the held-out edits are painted, where Flux is loaded."""
    steps: int = free(20)
    """Steps of the sampler."""
    guidance: float = free(3.5)
    """Guidance that a guidance-distilled base is given when it paints."""


@dataclass(frozen=True)
class Config:
    run: RunConfig
    text: Text
    data: Data
    """Edits that `sda prepare-edits` made. A cache must hold the features of all towers for both pictures."""
    adapter: Path | None = None
    """The adapter's file. The decoder learns to write its embedding of the edited picture."""
    vision: Vision = field(default_factory=lambda: Vision(()))
    """The adapter's towers."""
    fits: Path | None = None
    """Instead of an adapter: the folder of embeddings that `sda invert` fitted to these edits, sources and targets. The
    decoder then edits fitted embeddings."""
    presets: tuple[str, ...] = ("tree128", "tree128", "tree64", "global32")
    """Hierarchy presets. Each batch takes one of them at random."""
    decoder: Decoder = field(default_factory=Decoder)
    objective: EditorTraining = field(default_factory=EditorTraining)
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(identity=0.05, reversed=0.15))
    flow: FlowTraining = field(default_factory=FlowTraining)
    base: Flux = field(default_factory=Flux)
    validation: Validation = field(default_factory=Validation)
    licence: str = free("not stated")
    """Licence of the exported file. The licences of the base and of the LLM apply as well."""


def check(config: Config, world: World) -> None:
    """Refuse in one sentence what cannot work, before anything is loaded. ValueError."""
    decoder, base = config.decoder, config.base
    if decoder.llm and (decoder.architecture == "t5" or decoder.start):
        raise ValueError("decoder.llm is given for a T5; set decoder.architecture to causal_lm, or leave the LLM out."
                         if decoder.architecture == "t5"
                         else "decoder.start has an LLM of its own; leave decoder.llm out.")
    if decoder.architecture == "causal_lm" and not (decoder.llm or decoder.start):
        raise ValueError("decoder.llm is missing: give the folder of a causal LLM such as Qwen3.")
    check_space(config)
    check_data(config.data)
    if config.flow.weight and (base.flux is None or base.vae is None):
        raise ValueError("flow.weight asks for training through Flux; give base.flux and base.vae, or set it to 0.")
    world.share(config.run.batch, config.run.micro)
    check_folder(config.run.out)
    through = ((base.flux, "base.flux"), (base.vae, "base.vae")) if config.flow.weight else ()
    check_files((config.adapter, "adapter"), (config.fits, "fits"), (config.text.path, "text.path"), (decoder.llm, "decoder.llm"),
                (decoder.start, "decoder.start"), *through, *((path, "vision.files") for path in config.vision.files))
    if through:
        check_base(base, world)
        skeleton(base.flux, outline)
        vae_of(base.vae, outline)


def check_space(config) -> None:
    """The presets and the space, an adapter's or that of fits, of any stage on edits. ValueError."""
    if not config.presets:
        raise ValueError("presets is empty; name at least one, such as tree128.")
    if (config.adapter is None) == (config.fits is None):
        raise ValueError("Give either an adapter or a folder of fits: the embeddings are those of one of them.")
    presets = {*config.presets, config.validation.preset}
    for preset in presets:
        named_hierarchy(preset)
    if config.fits and len(presets) > 1:
        raise ValueError(f"Fitted embeddings have one preset; give it as presets and as validation.preset, not "
                         f"{', '.join(sorted(presets))}.")
    if config.fits and (config.vision.files or config.data.cache):
        raise ValueError("Fits need no vision towers and no cache; leave vision and data.cache out.")


def new_decoder(settings: Decoder, space: tuple, dtype: torch.dtype) -> EditDecoder:
    """The decoder before its training, frozen where it does not learn. space: (dim, text_dim, hierarchy) of the adapter
    and the text encoder. dtype: of a frozen LLM."""
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
    """The decoder in `settings.start`. ValueError where it is of another architecture or space (dim, text_dim,
    hierarchy)."""
    decoder, _ = load_editor(settings.start, torch.device("cpu"))
    config = decoder.config
    if config.architecture != settings.architecture:
        raise ValueError(f"{settings.start} is a {config.architecture} and decoder.architecture says "
                         f"{settings.architecture}; make them the same.")
    if (config.dim, config.text_dim, config.hierarchy) != space:
        raise ValueError(f"{settings.start} was made for another adapter or text encoder; start from one of "
                         "this adapter.")
    return decoder.train().requires_grad_(True)
