"""The `sda` command: every command is a module with a dataclass Config and run(config).

A command's settings come from its TOML file (--config) and from flags, which win; `--help` lists every key.
"""
from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path

CONFIGS = Path(__file__).parent / "miniature" / "configs"
# command -> (module, what it does)
COMMANDS = {
    "prepare": ("data.prepare", "pictures to shards and an index"),
    "prepare-edits": ("data.prepare_edits", "(source, target, instruction) sets to shards and an index"),
    "cache": ("data.fill_cache", "latents and tower features of prepared pictures"),
    "statistics": ("stages.statistics", "what a text encoder writes, as a small file that stands in for it"),
    "train adapter": ("stages.adapter", "the adapter through a frozen FLUX.1"),
    "train editor": ("stages.editor", "the edit decoder"),
    "train gate": ("stages.gate", "a LoRA with which FLUX.1 reads a source picture by a gate"),
    "invert": ("stages.invert", "an embedding for every picture, fitted through a frozen FLUX.1 without an adapter"),
    "plan invert": ("plan.invert", "memory, time and cost of `invert`, before it starts"),
    "plan gate": ("plan.gate", "memory, FLOPs, speed and cost of `train gate`, before it starts"),
    "plan": ("plan.plan", "memory, FLOPs, speed and cost of `train adapter`, before it starts"),
    "export": ("stages.export", "a run's averaged weights as the file that the nodes load"),
    "check": ("stages.check", "whether files are as they were saved"),
    "evaluate": ("judge.evaluate", "reconstructions or edits of any pictures, measured and shown side by side"),
}
# stage of the miniature -> (module, TOML file), in the order in which they build on one another
STAGES = {
    "scenes": ("preview", "scenes"), "vae": ("vae", "vae"), "text": ("reader", "text"), "base": ("base", "base"),
    "clip": ("clip", "clip"),
    "dinov2": ("dinov2", "dinov2"), "adapter": ("adapter", "adapter"), "editor": ("editor", "editor"),
    "gate": ("gate", "gate"), "adapter-unmasked": ("adapter", "adapter_unmasked"), "adapter-global64": ("adapter", "adapter_global64"),
}
# Made to be compared, and what goes on from exported files on a GPU: `all` leaves them out.
ASIDE = {"editor-llm": ("editor", "editor_llm"), "fits": ("fits", "fits"), "editor-from-fits": ("editor_fits", "editor_fits"),
         **{f"{name}-more": (module, f"{file}_more") for name, (module, file) in STAGES.items()
            if module in ("base", "adapter", "editor")}}


def usage() -> str:
    wide = max(map(len, COMMANDS)) + 2
    return "\n".join([
        "usage: sda COMMAND [--config FILE.toml] [--KEY.SUBKEY VALUE ...]",
        *(f"  {name:{wide}}{words}" for name, (_, words) in COMMANDS.items()),
        f"  {'miniature':{wide}}STAGE or all: the toy-width system, from nothing to assets/miniature",
        f"stages of the miniature, in their order: {', '.join(STAGES)}; beside them: {', '.join(ASIDE)}",
        "`sda COMMAND --help` lists every key. What was stopped goes on where it was."])


def run_module(module_name: str, arguments: list[str], prog: str, file: Path | None = None) -> bool:
    """Run a module; True where its run went to its end. file: the TOML file used where --config names none."""
    import tyro

    from .config import checked, from_toml

    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise ValueError("--config needs the name of a TOML file.")
        file, arguments = Path(arguments[at + 1]), arguments[:at] + arguments[at + 2:]
    module = importlib.import_module(f".{module_name}", __package__)
    default = {"default": from_toml(module.Config, file)} if file else {}
    return module.run(checked(tyro.cli(module.Config, args=arguments, prog=prog, **default))) is not False


def plan_of(argv: list[str]) -> list[tuple]:
    """The calls of run_module that a command line asks for; empty where it asks for nothing that exists."""
    if argv[:1] == ["miniature"] and len(argv) > 1 and argv[1] in (*STAGES, *ASIDE, "all"):
        stages = STAGES if argv[1] == "all" else {argv[1]: (STAGES | ASIDE)[argv[1]]}
        return [(f"miniature.{module}", argv[2:], f"sda miniature {name}", CONFIGS / f"{file}.toml")
                for name, (module, file) in stages.items()]
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return [(COMMANDS[name][0], argv[words:], f"sda {name}")]
    return []


def stopped() -> int:
    """The exit status of a command that was asked to stop. torchrun restarts whatever does not return 0."""
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else 130


# These libraries print at their import which other libraries they did not find. No command uses those.
LOUD = ("diffusers.quantizers.torchao.torchao_quantizer", "bitsandbytes.backends.cpu.ops")


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    calls = plan_of(argv)
    if not calls:
        print(usage())
        return 0 if argv in (["--help"], ["-h"]) else 2
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        for call in calls:
            if not run_module(*call):
                return stopped()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"sda: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sda: stopped; the same command goes on where it was.", file=sys.stderr)
        return stopped()
    return 0


if __name__ == "__main__":
    sys.exit(main())
