"""The `sda` command. `sda miniature STAGE` trains a stage of the miniature from its TOML file."""
from __future__ import annotations

import importlib
import sys
from pathlib import Path

CONFIGS = Path(__file__).parent / "miniature" / "configs"
# stage -> (module, configuration class); each module has `run(config)`.
STAGES = {"vae": "vae", "base": "base", "clip": "clip", "dinov2": "dinov2", "adapter": "adapter", "editor": "editor"}


def usage() -> str:
    return ("usage: sda miniature STAGE [--config FILE.toml] [--KEY.SUBKEY VALUE ...]\n"
            f"stages, in their order: {', '.join(STAGES)}\n"
            "`sda miniature STAGE --help` lists every key.")


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if len(argv) < 2 or argv[0] != "miniature" or argv[1] not in STAGES:
        print(usage())
        return 0 if argv in (["--help"], ["-h"]) else 2
    import tyro

    from .config import from_toml

    name, rest = argv[1], argv[2:]
    path = CONFIGS / f"{name}.toml"
    if "--config" in rest:
        at = rest.index("--config")
        path, rest = Path(rest[at + 1]), rest[:at] + rest[at + 2:]
    try:
        module = importlib.import_module(f".miniature.{STAGES[name]}", __package__)
        config = tyro.cli(module.Config, default=from_toml(module.Config, path), args=rest, prog=f"sda miniature {name}")
        module.run(config)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"sda: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
