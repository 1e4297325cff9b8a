"""LoRA on the LLM of an edit decoder (Hu et al., arXiv 2106.09685), by peft: the LLM itself stays as it was trained."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ...kernels.edit_decoder import EditDecoder, LLMEditDecoder


def add_lora(decoder: LLMEditDecoder, rank: int, alpha: float) -> None:
    """Freeze the LLM and give each of its linear layers a LoRA in float32; everything else of the decoder goes on
    learning.

    The update is alpha / rank times the product of two matrices of that rank, zero at the start.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise ValueError(f"A LoRA has a rank of at least 1, not {rank}; give lora_rank another value.")
    decoder.llm.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear"), decoder.llm)
    for parameter in decoder.llm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def merged_state(decoder: EditDecoder) -> dict[str, Tensor]:
    """The decoder's weights with the LoRA worked in, so that they load without peft; as they are where there is
    none."""
    state = decoder.state_dict()
    if not any(".lora_" in name for name in state):
        return state
    from peft.tuners.lora import LoraLayer

    state = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, module in decoder.named_modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            update = module.get_delta_weight("default").float()
            state[f"{name}.weight"] = (weight.detach().float() + update).to(weight.dtype)
    return state


class Learned(nn.Module):
    """The parameters of a module that may learn, and its buffers, without its frozen weights: the content of a
    checkpoint."""

    def __init__(self, module: nn.Module):
        super().__init__()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)


def load_llm(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The base model of a causal LLM in a local folder (config.json and safetensors), without its head. Never
    downloads."""
    from transformers import AutoModel

    if not (folder / "config.json").is_file():
        raise ValueError(f"There is no LLM in {folder} (no config.json); give the folder of a causal LLM such "
                         "as Qwen3.")
    try:
        llm = AutoModel.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"The LLM in {folder} cannot be loaded ({' '.join(str(error).split()).rstrip('.')}).") from error
    if not hasattr(llm.config, "hidden_size"):
        raise ValueError(f"{folder} holds a {llm.config.model_type!r}, which is more than a text model; give a causal "
                         "LLM of text.")
    return llm
