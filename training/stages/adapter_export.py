"""The files of a trained adapter, at the end of its run or by `sda export` from its newest checkpoint."""
from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...kernels import checkpoint
from ...kernels.adapter import Adapter, AdapterConfig
from ...kernels.vision.towers import TowerConfig
from ..config import build
from ..files import DTYPES, code_version
from ..frozen.encoders import load_one
from ..objectives.reconstruct import named_hierarchy
from .settings import Config


def build_adapter(config: Config, flux, towers: list[TowerConfig]) -> Adapter:
    """The adapter of a configuration for a base of this `FluxTransformer2DModel.config`, with random weights."""
    shape = config.adapter
    return Adapter(AdapterConfig(named_hierarchy(shape.table).to_json(), tuple(towers), shape.width, shape.heads,
                                 shape.layers,
                                 flux.joint_attention_dim, flux.pooled_projection_dim if shape.pooled else None))


def write_adapter(config: Config, identity: dict, state: dict[str, Tensor], tuned: list[Tensor], step: int,
                  to: Path | None = None, dtype: str | None = None) -> list[Path]:
    """Write semantic_adapters/<run>.safetensors and, where DINOv2 was tuned, clip_vision/<run>_<tower>.safetensors.

    identity: of the stage. state: the adapter's averaged weights and its buffers. tuned: DINOv2's averaged last blocks,
    in the order of `AdapterObjective.unlock`. dtype: fp16 unless another is asked for. Returns the paths.
    """
    dtype = DTYPES[dtype or "fp16"]
    to, name = to or config.run.out / "export", config.run.out.name
    common = {"step": step, "licence": config.licence, "code": code_version(), "base_sha256": identity["base"],
              "run": name}
    towers = dict(identity["towers"])
    paths = [to / "semantic_adapters" / f"{name}.safetensors"]
    blocks = config.objective.unlock_blocks
    if blocks and step > config.objective.unlock * config.run.planned:
        left = iter(tuned)
        for path, tower_id in config.vision.named():
            tower = load_one(path, tower_id).float()
            if tower.config.kind != "dinov2":
                continue
            with torch.no_grad():
                for parameter in tower.blocks[-blocks:].parameters():
                    parameter.copy_(next(left))
            paths.append(to / "clip_vision" / f"{name}_{tower.config.id}.safetensors")
            checkpoint.save(paths[-1], tower.model.state_dict(), kind="vision_tower", config=tower.config.to_json(),
                            dtype=dtype, tuned_blocks=blocks, tuned_from_sha256=identity["towers"][tower.config.id],
                            **common)
            towers[tower.config.id] = f"tuned: {paths[-1].name}"
    adapter, growth = identity["adapter"], config.objective.growth
    begun = [phase for phase, start in zip(growth, (0, *(p[0] for p in growth)))
             if start * config.run.planned < max(step, 1)]
    checkpoint.save(paths[0], state, kind="adapter", config=adapter, dtype=dtype, hierarchy=adapter["hierarchy"],
                    masked=config.objective.masked,
                    widths={"text": adapter["out_dim"], "pooled": identity["pooled_width"]},
                    presets=sorted({name for phase in begun for name in phase[1:]}),
                    growth_phase=[len(begun), len(growth)],
                    guidance_embeds=identity["guidance_embeds"], base_precision=config.base.precision, towers=towers,
                    steps_planned=config.run.max_steps, **common)
    return paths


def export_adapter(folder: Path, record: dict, to: Path, dtype: str | None) -> list[Path]:
    """Write the averaged weights of a checkpoint."""
    config = build(Config, record["config"], str(folder))
    # The average has every weight that learns; the rest are buffers.
    state = {**load_file(folder / "trainables.safetensors"), **load_file(folder / "average.safetensors")}
    adapter = {k.removeprefix("adapter."): v for k, v in state.items() if k.startswith("adapter.")}
    tuned = [state[f"tuned.{i}"] for i in range(sum(k.startswith("tuned.") for k in state))]
    return write_adapter(config, record["identity"], adapter, tuned, record["step"], to, dtype)
