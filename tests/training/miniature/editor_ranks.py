"""Not a test: `sda train editor` by one process and by two.

usage: editor_ranks.py CONFIG OUT. Runs the configuration into OUT/1 and OUT/2, for test_train_editor.py to compare.
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

import open_clip  # noqa: E402, F401  (what a run imports on its way: here, so that forked processes have it)
import peft  # noqa: E402, F401
import PIL.Image  # noqa: E402, F401
import pyarrow.parquet  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401
from processes import run  # noqa: E402
from semantic_diffusion_adapter.training import cli  # noqa: E402
from semantic_diffusion_adapter.training.stages import editor  # noqa: E402


def trained(config: str, out: str) -> bool:
    torch.set_num_threads(1)
    return cli.main(["train", "editor", "--config", config, "--out", out]) == 0


if __name__ == "__main__":
    editor.MEASURED = 16
    for size in (1, 2):
        run(size, lambda size=size: trained(sys.argv[1], f"{sys.argv[2]}/{size}"))
