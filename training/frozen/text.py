"""Instructions as Flux's T5 encodes them: the edit decoder reads the same in training as in the nodes.

Texts are padded to a fixed length. As in Flux, the padding is not masked. ComfyUI pads to 256 tokens.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ...kernels import checkpoint
from ...kernels.precision import resolve
from ...kernels.words import word_ids
from ..files import outline
from .base import base_sha256
from .fp8 import unscaled

LENGTH = 256
TextPrecision = Literal["auto", "bf16", "fp32", "int8"]
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


class InstructionEncoder:
    """texts -> their encoding [B, L, width] on the encoder's device. `hash` identifies the encoder."""

    def __init__(self, model: nn.Module, ids: Callable[[list[str]], Tensor], hash: str):
        self.model, self.ids, self.hash = model.eval().requires_grad_(False), ids, hash

    @property
    def width(self) -> int:
        return self.model.config.d_model

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        ids = self.ids(list(texts)).to(self.model.device)
        # The mask of ones is explicit: without it some versions of transformers mask the padding on their own.
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def load_instruction_encoder(path: Path, device: torch.device, tokenizer: Path | None = None, length: int = LENGTH,
                             precision: TextPrecision = "auto") -> InstructionEncoder:
    """Flux's T5 from a diffusers folder (FLUX.1-dev's own, or its text_encoder_2), from ComfyUI's single file
    (t5xxl_fp16.safetensors), or the miniature's text encoder. Never downloads.

    tokenizer: the folder of T5's tokenizer; None: in or beside the encoder (tokenizer_2, t5_tokenizer). length: tokens,
    padding included.
    precision: of the weights; auto: bf16 where the device computes it fast, fp32 elsewhere; int8 (torchao, one scale
    per row) halves what T5-XXL takes in bf16, 9.5 GB. The miniature's stays in fp32. ValueError in one sentence for
    what is missing or does not fit.
    """
    if path.is_file() and checkpoint.has_record(path):
        encoder, record = load_word_encoder(path, device)
        words, longest = {word: n for n, word in enumerate(record["config"]["vocabulary"])}, record["config"]["length"]
        return InstructionEncoder(encoder,
                                  lambda texts: torch.tensor([word_ids(text, words, longest) for text in texts]),
                                  base_sha256(path))
    model = load_t5(path, torch.float32 if resolve(precision, device) == "fp32" else torch.bfloat16)
    words = load_tokenizer(path, model.config.vocab_size, tokenizer)

    def ids(texts: list[str]) -> Tensor:
        return words(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids

    model = model.to(device)
    if precision == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    return InstructionEncoder(model, ids, base_sha256(encoder_place(path)))


def load_word_encoder(path: Path, device: torch.device) -> tuple[nn.Module, dict]:
    """The miniature's T5 over words, frozen, in float32, and its record."""
    from transformers import T5Config, T5EncoderModel

    state, record = checkpoint.load(path, "text_encoder")
    encoder = T5EncoderModel(T5Config(**record["config"]["t5"]))
    encoder.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return encoder.to(device).eval().requires_grad_(False), record


def encoder_place(path: Path) -> Path:
    """Where T5 itself lies: text_encoder_2 of a diffusers folder, or the path."""
    return path / "text_encoder_2" if (path / "text_encoder_2").is_dir() else path


def load_tokenizer(path: Path, vocabulary: int, folder: Path | None = None):
    """T5's tokenizer, called as transformers' are. It is the one in `folder` or, for None, the one in or beside the
    encoder at `path`.

    vocabulary: number of words that the encoder has. ValueError where there is no tokenizer, or one with more words.
    """
    from transformers import AutoTokenizer

    beside = encoder_place(path).parent
    places = (folder,) if folder else (beside / "tokenizer_2", path, beside, beside / "t5_tokenizer")
    found = next((place for place in places if any((place / name).is_file() for name in _TOKENIZER_FILES)), None)
    if found is None:
        raise ValueError(f"There is no tokenizer {'in ' + str(folder) if folder else 'beside ' + str(path)}; give the "
                         "folder of T5's, such as tokenizer_2 of FLUX.1-dev or ComfyUI's "
                         "comfy/text_encoders/t5_tokenizer.")
    words = AutoTokenizer.from_pretrained(found, local_files_only=True)
    if len(words) > vocabulary:
        raise ValueError(f"The tokenizer in {found} has {len(words)} words and the text encoder {path} {vocabulary}; "
                         "give its own.")
    return words


def load_t5(path: Path, dtype: torch.dtype) -> nn.Module:
    """Flux's T5 encoder from a diffusers folder (or its text_encoder_2) or ComfyUI's single file, on the CPU.
    ValueError where there is none."""
    if not path.exists():
        raise ValueError(f"There is no text encoder at {path}; give FLUX.1's T5 as a diffusers folder or as ComfyUI's "
                         "t5xxl file.")
    return _from_folder(encoder_place(path), dtype) if path.is_dir() else _from_file(path, dtype)


def t5_width(path: Path) -> int:
    """Channels of a T5's outputs, by its configuration or by the header of its file. ValueError where there is none."""
    if path.is_dir():
        folder = _folder_of_t5(encoder_place(path))
        return int(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("d_model", 0))
    return t5_config(path, outline(path)).d_model


def _folder_of_t5(folder: Path) -> Path:
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ValueError(f"There is no T5 in {folder} (config.json and safetensors); give text_encoder_2 of "
                         "FLUX.1-dev.")
    return folder


def _from_folder(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import T5EncoderModel

    try:
        return T5EncoderModel.from_pretrained(_folder_of_t5(folder), dtype=dtype, local_files_only=True,
                                              use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"The T5 in {folder} cannot be loaded ({' '.join(str(error).split()).rstrip('.')}).") from error


def t5_config(path: Path, state: dict[str, Tensor]):
    """transformers' configuration of a T5 v1.1 encoder, its sizes read off its weights."""
    from transformers import T5Config

    first, biases = "encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    inner = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    if any(name not in state for name in (first, biases, inner, "shared.weight")):
        raise ValueError(f"{path} is no plain T5 v1.1 encoder; give ComfyUI's t5xxl_fp16.safetensors.")
    (vocabulary, width), heads = state["shared.weight"].shape, state[biases].shape[1]
    return T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=state[first].shape[0] // heads, d_ff=state[inner].shape[0],
        num_heads=heads,
        num_layers=1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.block.")),
        relative_attention_num_buckets=state[biases].shape[0], feed_forward_proj="gated-gelu", dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1)


def _from_file(path: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import T5EncoderModel

    state = unscaled(path, checkpoint.load_tensors(path))
    with torch.device("meta"):
        model = T5EncoderModel(t5_config(path, state))
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    try:
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} is no plain T5 v1.1 encoder ({' '.join(str(error).split())[:200]}); give ComfyUI's "
                         "t5xxl_fp16.safetensors.") from error
    return model
