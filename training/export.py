"""`sda export`: a run's averaged weights as the files that the nodes load, laid out like ComfyUI's models folder."""
from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor

from ..kernels import checkpoint
from ..kernels.adapter import Adapter, AdapterConfig
from ..kernels.vision.towers import TowerConfig
from .adapter import named_hierarchy
from .config import build
from .encoders import load_one
from .engine.checkpoints import newest_whole
from .stages.settings import Config as AdapterTrainingConfig

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}


@dataclass(frozen=True)
class Config:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run of `sda train adapter` or `sda train editor`."""
    to: Path | None = None
    """Where the files go; `export` in the run's folder otherwise. ComfyUI's models folder will do."""
    dtype: Literal["fp16", "bf16", "fp32", "int8"] = "fp16"


def build_adapter(config: AdapterTrainingConfig, flux, towers: list[TowerConfig]) -> Adapter:
    """The adapter of a configuration for a base of this `FluxTransformer2DModel.config`, with random weights."""
    shape = config.adapter
    return Adapter(AdapterConfig(named_hierarchy(shape.table).to_json(), tuple(towers), shape.width, shape.heads, shape.layers,
                                 flux.joint_attention_dim, flux.pooled_projection_dim if shape.pooled else None))


def write(config: AdapterTrainingConfig, identity: dict, state: dict[str, Tensor], tuned: list[Tensor], step: int,
          to: Path | None = None, dtype: str = "fp16") -> list[Path]:
    """Write semantic_adapters/<run>.safetensors and, where DINOv2 was tuned, clip_vision/<run>_<tower>.safetensors.

    identity: of the stage. state: the adapter's averaged weights and its buffers. tuned: DINOv2's averaged last blocks, in the
    order of `AdapterObjective.unlock`. Returns the paths.
    """
    to, name = to or config.run.out / "export", config.run.out.name
    common = {"step": step, "licence": config.licence, "code": code_version(), "base_sha256": identity["base"], "run": name}
    towers = dict(identity["towers"])
    paths = [to / "semantic_adapters" / f"{name}.safetensors"]
    blocks = config.objective.unlock_blocks
    if blocks and step > config.objective.unlock * config.run.max_steps:
        left = iter(tuned)
        for path, tower_id in zip(config.vision.files, config.vision.ids or [""] * len(config.vision.files)):
            tower = load_one(path, tower_id).float()
            if tower.config.kind != "dinov2":
                continue
            with torch.no_grad():
                for parameter in tower.blocks[-blocks:].parameters():
                    parameter.copy_(next(left))
            paths.append(to / "clip_vision" / f"{name}_{tower.config.id}.safetensors")
            checkpoint.save(paths[-1], tower.model.state_dict(), kind="vision_tower", config=tower.config.to_json(),
                            dtype=DTYPES[dtype], tuned_blocks=blocks, tuned_from_sha256=identity["towers"][tower.config.id], **common)
            towers[tower.config.id] = f"tuned: {paths[-1].name}"
    adapter, growth = identity["adapter"], config.objective.growth
    begun = [phase for phase, start in zip(growth, (0, *(p[0] for p in growth))) if start * config.run.max_steps < max(step, 1)]
    checkpoint.save(paths[0], state, kind="adapter", config=adapter, dtype=DTYPES[dtype], hierarchy=adapter["hierarchy"],
                    masked=config.objective.masked, widths={"text": adapter["out_dim"], "pooled": identity["pooled_width"]},
                    presets=sorted({name for phase in begun for name in phase[1:]}), growth_phase=[len(begun), len(growth)],
                    guidance_embeds=identity["guidance_embeds"], base_precision=config.base.precision, towers=towers,
                    steps_planned=config.run.max_steps, **common)
    return paths


def code_version() -> str:
    """The git commit of this code, or its release where it is no clone."""
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        try:
            return subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    try:
        return version("semantic-diffusion-adapter")
    except PackageNotFoundError:
        return "unknown"


def run(config: Config) -> bool:
    """Export the newest whole checkpoint of a run."""
    folder = newest_whole(config.run / "checkpoints")
    if folder is None:
        raise ValueError(f"There is no checkpoint in {config.run}; give the folder of a run that has saved one.")
    record = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
    if "decoder" in record["identity"]:
        from .stages.editor_export import export_editor

        print(export_editor(folder, record, config.to or config.run / "export", config.dtype))
        return True
    if record["stage"] != "adapter" or "adapter" not in record["identity"]:
        raise ValueError(f"{config.run} holds a run of '{record['stage']}' that `sda train adapter` did not make; "
                         "it exports at its own end.")
    settings = build(AdapterTrainingConfig, record["config"], str(folder))
    # The average has every weight that learns; the rest are buffers.
    state = {**load_file(folder / "trainables.safetensors"), **load_file(folder / "average.safetensors")}
    adapter = {k.removeprefix("adapter."): v for k, v in state.items() if k.startswith("adapter.")}
    tuned = [state[f"tuned.{i}"] for i in range(sum(k.startswith("tuned.") for k in state))]
    for path in write(settings, record["identity"], adapter, tuned, record["step"], config.to or config.run / "export", config.dtype):
        print(path)
    return True
