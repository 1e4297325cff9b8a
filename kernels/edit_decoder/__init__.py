"""The edit decoder: reads a semantic embedding and an instruction and writes the edited embedding.

Two architectures behind one interface (`base.EditDecoder`): T5's decoder as in the original, and a causal LLM in its
place. A checkpoint names its own; files from before there was a choice name none and are T5.
"""

from __future__ import annotations

import os
from typing import Any

from .. import checkpoint, schema, weights
from .base import MODES, EditDecoder, EditDecoderConfig
from .llm import LLMEditDecoder, LLMEditDecoderConfig
from .t5 import T5EditDecoder, T5EditDecoderConfig

__all__ = [
    "ARCHITECTURES", "MODES", "EditDecoder", "EditDecoderConfig", "LLMEditDecoder", "LLMEditDecoderConfig", "T5EditDecoder",
    "T5EditDecoderConfig", "build_edit_decoder", "read_config", "read_edit_decoder",
]  # fmt: skip

ARCHITECTURES: dict[str, tuple[type[EditDecoderConfig], type[EditDecoder]]] = {
    config.architecture: (config, decoder)
    for config, decoder in ((T5EditDecoderConfig, T5EditDecoder), (LLMEditDecoderConfig, LLMEditDecoder))
}


def read_config(record: dict[str, Any]) -> EditDecoderConfig:
    """The configuration in a checkpoint's record. ValueError where this version of the pack does not know it."""
    fields = dict(record)
    architecture = fields.pop("architecture", T5EditDecoderConfig.architecture)
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(
            f"The edit decoder is a {schema.short(architecture)} and this version of the pack knows "
            f"{', '.join(ARCHITECTURES)}; update the pack."
        )
    return schema.parse(ARCHITECTURES[architecture][0], fields, "The edit decoder record")


def build_edit_decoder(config: EditDecoderConfig) -> EditDecoder:
    """An untrained edit decoder of the configuration's architecture: it copies its source."""
    return ARCHITECTURES[config.architecture][1](config)


def read_edit_decoder(path: str | os.PathLike) -> tuple[EditDecoder, dict[str, Any]]:
    """(edit decoder in float32 on the CPU, record) of a file.

    ValueError in one sentence where there is none or it does not fit.
    """
    tensors, record = checkpoint.load(path, "edit_decoder")
    config = read_config(record["config"])
    if record.get("hierarchy") not in (None, config.to_json()["hierarchy"]):
        raise ValueError(f"{path} says two things of its hierarchy: export the file again.")
    return weights.build(lambda: build_edit_decoder(config), tensors, path), record
