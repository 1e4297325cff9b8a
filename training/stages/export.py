"""`sda export`: a run's averaged weights as the files that the nodes load, laid out like ComfyUI's models folder."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..engine.sealed import newest_whole, read_record
from .adapter_export import export_adapter
from .editor_export import export_editor
from .gate import export_gate


@dataclass(frozen=True)
class Config:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run of `sda train adapter`, `sda train editor` or `sda train gate`."""
    to: Path | None = None
    """Where the files go. Default: `export` in the run's folder. ComfyUI's models folder works too."""
    dtype: Literal["fp16", "bf16", "fp32", "int8"] | None = None
    """dtype of the weights. Default: the one that the run itself exports, fp16 for an adapter and bf16 for an edit
    decoder and a gate's LoRA."""


def run(config: Config) -> bool:
    """Export the newest whole checkpoint of a run."""
    folder = newest_whole(config.run / "checkpoints")
    if folder is None:
        raise ValueError(f"There is no checkpoint in {config.run}; give the folder of a run that has saved one.")
    record = read_record(folder)
    to, identity = config.to or config.run / "export", record["identity"]
    if "decoder" in identity:
        paths = [export_editor(folder, record, to, config.dtype)]
    elif "gate" in identity:
        paths = [export_gate(folder, record, to, config.dtype)]
    elif record["stage"] == "adapter" and "adapter" in identity:
        paths = export_adapter(folder, record, to, config.dtype)
    else:
        raise ValueError(f"{config.run} holds a run of '{record['stage']}' that `sda train adapter` did not make; "
                         "it exports at its own end.")
    print(*paths, sep="\n")
    return True
