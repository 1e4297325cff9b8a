"""`sda check`: whole files of this pack against the digests in their records.

The nodes check every file that is hashed in less than a second. This command checks files of any size.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ...kernels import checkpoint


@dataclass(frozen=True)
class Config:
    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files of adapters, edit decoders, vision towers, embeddings."""


def run(config: Config) -> bool:
    """Print for each file whether it is as it was saved. ValueError for the first that is not."""
    for path in config.files:
        verdict = "is as it was saved" if checkpoint.verify(path) else "was saved before there were digests: only its form is checked"
        print(f"{path} {verdict}.")
    return True
