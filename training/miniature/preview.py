"""Stage 0: look at the world. Write scenes of a split as PNG with their truth, and the bundled held-out scene."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .captions import caption
from .editor import change_of
from .scenes import render, scene

BUNDLED = ("test", 8)  # split and number of the scene that ships as assets/miniature/scene.png


@dataclass(frozen=True)
class Config:
    out: Path
    """Folder for the pictures."""
    bundled: Path
    """Where the bundled held-out scene goes."""
    split: str = "test"
    count: int = 16


def run(config: Config) -> bool:
    config.out.mkdir(parents=True, exist_ok=True)
    for index in range(config.count):
        change = change_of(config.split, index)
        for name, picture in (("source", change.source), ("edited", change.target)):
            Image.fromarray(render(picture)).save(config.out / f"{config.split}_{index:04d}_{name}.png")
        truth = {"caption": caption(change.source), "instruction": change.instruction,
                 "source": change.source.to_json(), "edited": change.target.to_json()}
        (config.out / f"{config.split}_{index:04d}.json").write_text(json.dumps(truth, indent=1), encoding="utf-8")
    config.bundled.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render(scene(*BUNDLED))).save(config.bundled)
    return True
