"""Mean and deviation, by channel, of what Flux's T5 writes for real prompts: where the adapter's output starts out."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...kernels import checkpoint
from ...kernels.precision import frozen_dtype
from .text import t5_from_folder

# For sets without captions: things, people, places, light and style, as prompts name them.
PROMPTS = (
    "a photo of a red fox in the snow at dusk", "portrait of an old fisherman, deep wrinkles, soft window light",
    "a busy street market in Marrakesh, seen from above", "two children build a sandcastle on a grey beach",
    "a bowl of ramen with a soft-boiled egg, steam, dark wooden table", "minimalist living room with a green sofa and a round mirror",
    "an astronaut riding a horse, oil painting", "close-up of a dew drop on a blade of grass, macro photography",
    "a steam locomotive crosses a stone bridge in autumn", "the word OPEN painted on a blue wooden door",
    "aerial view of rice terraces under morning fog", "a black cat sleeps on a stack of books beside a lamp",
    "a woman in a yellow raincoat waits at a bus stop, rain, reflections", "modern glass office building against a clear sky",
    "watercolour of a small harbour with fishing boats", "a violinist on stage, one spotlight, dark background",
    "three ceramic vases on a shelf, pastel colours", "a mountain lake with snow-covered peaks, golden hour, wide angle",
    "an old pickup truck in a field of sunflowers", "a robot waters plants on a balcony, digital art",
)


def text_statistics(path: Path, captions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """(mean [D], deviation [D]) float32 of the text encoder's outputs.

    path: a safetensors file that holds them as `text_mean` and `text_std`, or a diffusers folder with text_encoder_2 and
        tokenizer_2, whose encoder reads the captions (or PROMPTS where there are fewer than 64); padding does not count.
    """
    path = Path(path)
    if path.is_file():
        tensors = checkpoint.load(path, "adapter")[0] if checkpoint.has_record(path) else checkpoint.load_tensors(path)
        if "text_mean" not in tensors or "text_std" not in tensors:
            raise ValueError(f"{path} holds no text_mean and text_std; "
                             "give an exported adapter, or a diffusers folder with text_encoder_2.")
        return tensors["text_mean"].float(), tensors["text_std"].float()
    if not (path / "text_encoder_2").is_dir() or not (path / "tokenizer_2").is_dir():
        raise ValueError(f"{path} has no text_encoder_2 and tokenizer_2; give the diffusers folder of FLUX.1-dev, or an exported adapter.")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer_2", local_files_only=True)
    encoder = t5_from_folder(path / "text_encoder_2", frozen_dtype(device)).to(device).eval()
    words = captions if len(captions) >= 64 else list(PROMPTS)
    found = []
    with torch.no_grad():
        for text in words:
            ids = tokenizer(text, truncation=True, max_length=512, return_tensors="pt").input_ids.to(device)
            found.append(encoder(input_ids=ids).last_hidden_state[0].float().cpu())
    outputs = torch.cat(found)
    return outputs.mean(0), outputs.std(0)
