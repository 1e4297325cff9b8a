"""The file of a trained edit decoder, at the end of its run or by `sda export` from its newest checkpoint."""
from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from ...kernels import checkpoint
from ...kernels.edit_decoder import EditDecoder, read_config
from ..config import build
from ..files import DTYPES, code_version
from ..objectives.lora import Learned, merged_state
from .editor_settings import Config, new_decoder


def write_editor(config: Config, identity: dict, decoder: EditDecoder, step: int, to: Path | None = None,
                 dtype: str | None = None) -> Path:
    """Write edit_decoders/<run>.safetensors, with an LLM's LoRA merged. Returns its path.

    identity: of the stage. dtype: bf16 unless another is asked for.
    """
    name = config.run.out.name
    path = (to or config.run.out / "export") / "edit_decoders" / f"{name}.safetensors"
    checkpoint.save(path, merged_state(decoder), kind="edit_decoder", config=decoder.config.to_json(),
                    dtype=DTYPES[dtype or "bf16"],
                    hierarchy=list(decoder.config.hierarchy), step=step, steps_planned=config.run.max_steps,
                    base_sha256=identity["base"], text_encoder_sha256=identity["text"], licence=config.licence,
                    code=code_version(), run=name, **learnt(identity))
    return path


def learnt(identity: dict) -> dict:
    """Whose embeddings a decoder edits: an adapter's, or fitted ones."""
    if "fits" in identity:
        return {"fitted": True}
    return {"adapter_sha256": identity["adapter"], "towers": identity["towers"]}


def export_editor(folder: Path, record: dict, to: Path, dtype: str | None) -> Path:
    """Write the averaged weights of a checkpoint. Of the run's inputs, only the LLM or the file that it began from is
    needed."""
    config = build(Config, record["config"], str(folder))
    shape = read_config(record["identity"]["decoder"])
    decoder = new_decoder(config.decoder, (shape.dim, shape.text_dim, shape.hierarchy), torch.float32)
    # The average has every weight that learns; the rest are buffers.
    state = {**load_file(folder / "trainables.safetensors"), **load_file(folder / "average.safetensors")}
    Learned(decoder).load_state_dict({name.removeprefix("decoder."): tensor for name, tensor in state.items()})
    return write_editor(config, record["identity"], decoder, record["step"], to, dtype)
