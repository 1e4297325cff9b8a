"""The `sda` command. `sda miniature STAGE` trains a stage of the miniature from its TOML file."""
from __future__ import annotations

import importlib
import sys
from pathlib import Path

CONFIGS = Path(__file__).parent / "miniature" / "configs"
# stage -> (module, TOML file), in the order in which they build on one another; each module has Config and run(config).
STAGES = {
    "scenes": ("preview", "scenes"), "vae": ("vae", "vae"), "text": ("reader", "text"), "base": ("base", "base"), "clip": ("clip", "clip"),
    "dinov2": ("dinov2", "dinov2"), "adapter": ("adapter", "adapter"), "editor": ("editor", "editor"),
    "adapter-unmasked": ("adapter", "adapter_unmasked"), "adapter-global64": ("adapter", "adapter_global64"),
}


def usage() -> str:
    return ("usage: sda miniature STAGE [--config FILE.toml] [--KEY.SUBKEY VALUE ...]\n"
            "       sda miniature all\n"
            f"stages, in their order: {', '.join(STAGES)}\n"
            "`sda miniature STAGE --help` lists every key. A stage that was stopped goes on where it was.")


def run_stage(name: str, arguments: list[str]) -> bool:
    """Whether the stage ran to its end."""
    import tyro

    from .config import from_toml

    module_name, file = STAGES[name]
    path = CONFIGS / f"{file}.toml"
    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise ValueError("--config needs the name of a TOML file.")
        path, arguments = Path(arguments[at + 1]), arguments[:at] + arguments[at + 2:]
    module = importlib.import_module(f".miniature.{module_name}", __package__)
    return module.run(tyro.cli(module.Config, default=from_toml(module.Config, path), args=arguments, prog=f"sda miniature {name}"))


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if len(argv) < 2 or argv[0] != "miniature" or argv[1] not in (*STAGES, "all"):
        print(usage())
        return 0 if argv in (["--help"], ["-h"]) else 2
    try:
        for name in STAGES if argv[1] == "all" else argv[1:2]:
            if not run_stage(name, argv[2:]):
                return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"sda: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
