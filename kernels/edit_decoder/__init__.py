"""The edit decoder: reads a semantic embedding and an instruction and writes the edited embedding.

Two architectures behind one interface (`base.EditDecoder`): T5's decoder as in the original, and any causal LLM in its
place. A checkpoint names its own; files from before there was a choice name none and are T5.
"""

from __future__ import annotations

from typing import Any

from .base import MODES, EditDecoder, EditDecoderConfig
from .llm import LLMEditDecoder, LLMEditDecoderConfig
from .t5 import T5EditDecoder, T5EditDecoderConfig

__all__ = [
    "ARCHITECTURES", "MODES", "EditDecoder", "EditDecoderConfig", "LLMEditDecoder", "LLMEditDecoderConfig", "T5EditDecoder",
    "T5EditDecoderConfig", "build_edit_decoder", "read_config",
]  # fmt: skip

ARCHITECTURES: dict[str, tuple[type[EditDecoderConfig], type[EditDecoder]]] = {
    config.architecture: (config, decoder)
    for config, decoder in ((T5EditDecoderConfig, T5EditDecoder), (LLMEditDecoderConfig, LLMEditDecoder))
}


def read_config(record: dict[str, Any]) -> EditDecoderConfig:
    """The configuration in a checkpoint's record. ValueError where this version of the pack does not know it."""
    fields = dict(record)
    architecture = fields.pop("architecture", T5EditDecoderConfig.architecture)
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"The edit decoder is a {architecture!r} and this version of the pack knows {', '.join(ARCHITECTURES)}; update the pack."
        )
    try:
        return ARCHITECTURES[architecture][0](**fields)
    except TypeError as error:
        raise ValueError(f"The edit decoder record does not fit this version of the pack ({error}); update the pack.") from None


def build_edit_decoder(config: EditDecoderConfig) -> EditDecoder:
    """An untrained edit decoder of the configuration's architecture: it copies its source."""
    return ARCHITECTURES[config.architecture][1](config)
