"""Not a test: the validation of one adapter by one, two and three processes, and by two that have its base cut between them.

usage: held_ranks.py CONFIG OUT. Writes what every process found out to OUT/<case>.<rank>.json, for test_held_out.py to compare.
"""
from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

import open_clip  # noqa: E402, F401  (what a run imports on its way: here, so that forked processes have it)
import PIL.Image  # noqa: E402, F401
import pyarrow.parquet  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401
from processes import run  # noqa: E402
from semantic_diffusion_adapter.training.config import from_toml  # noqa: E402
from semantic_diffusion_adapter.training.engine import World  # noqa: E402
from semantic_diffusion_adapter.training.stages import settings  # noqa: E402
from semantic_diffusion_adapter.training.stages.adapter import AdapterStage  # noqa: E402


def validated(config: settings.Config, out: Path, case: str) -> None:
    torch.set_num_threads(1)
    world = World.start("cpu")
    torch.manual_seed(0)
    stage, seen = AdapterStage(config, world.device), []
    for parameter in stage.trainables.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    read = stage.validation.read
    stage.validation.read = lambda index, row, bucket: seen.append(row) or read(index, row, bucket)
    figures = stage.validate()
    looked, grid = list(seen), stage.pictures()["reconstructions"]
    told = {"figures": figures, "looked": looked, "grid": grid.astype(int).tolist()}
    (out / f"{case}.{os.environ['RANK']}.json").write_text(json.dumps(told))
    world.leave()


if __name__ == "__main__":
    config, out = from_toml(settings.Config, Path(sys.argv[1])), Path(sys.argv[2])
    for size in (1, 2, 3):
        run(size, lambda size=size: validated(config, out, str(size)))
    run(2, lambda: validated(replace(config, base=replace(config.base, sharded=True)), out, "cut"))
