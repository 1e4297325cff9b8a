#!/usr/bin/env python3
"""Semantic Diffusion Adapter: one file to start from, on Linux, macOS and Windows. Standard library only.

    python3 run.py demo     encode, edit and repaint a picture in a real ComfyUI
    python3 run.py test     all tests (arguments go to pytest)
    python3 run.py eval     measure the shipped miniature (arguments go to the evaluation)
    python3 run.py bench attention      time the attention routes
    python3 run.py bench decoders       compare the edit decoders of the miniature
    python3 run.py bench training       speed and memory of a training step through FLUX.1's full shape
    python3 run.py bench plan           what `sda plan` predicts and what this machine takes
    python3 run.py bench files          load ten thousand damaged and hostile files
    python3 run.py bench data           pictures a second that one core prepares and decodes
    python3 run.py bench redux          pool a style model's tokens before its projection or after

The first start makes .venv and .host beside this file; later ones reuse them. COMFYUI_PATH (and COMFYUI_PYTHON) name
another ComfyUI to run in.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from runner.client import Client
from runner.environment import ROOT, Environment, Failure, module, prepare
from runner.server import serve
from runner.workflow import fill, pictures, to_prompt

SCENE = ROOT / "assets" / "miniature" / "scene.png"
WORKFLOW = ROOT / "example_workflows" / "01 Reconstruct and edit (miniature).json"
WEIGHTS = ROOT / "assets" / "miniature" / "diffusion_models" / "miniature_flux.safetensors"
PACKAGE = "semantic_diffusion_adapter"


def say(text: str) -> None:
    print(text, flush=True)


def demo(arguments: argparse.Namespace) -> int:
    clock = Clock()
    if arguments.image and not arguments.image.is_file():
        raise Failure(f"There is no picture {arguments.image}.")
    for part in (WEIGHTS, SCENE, WORKFLOW):
        if not part.is_file():
            raise Failure(f"{part.relative_to(ROOT)} is missing from {ROOT}: clone the repository again.")
    environment = prepare()
    clock.lap("setup")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    upload = out / "source.png"
    picture(environment, "check", arguments.image or SCENE, upload)
    clock.lap("picture")
    say("Starting ComfyUI ...")
    with serve(environment, arguments.port, say) as server:
        clock.lap("comfyui")
        client = Client(server.url)
        try:
            prompt = to_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), client.json("/object_info"))
            fill(prompt, client.upload(upload), arguments.instruction, arguments.seed)
            saved = pictures(prompt, client.run(prompt, Progress(prompt)))
            files = {name: client.image(saved[name]) for name in ("source", "reconstruction", "edited")}
        except OSError as error:
            server.check()  # a server that has ended explains the rest
            raise Failure(f"The connection to ComfyUI broke: {error}.") from error
        except Failure:
            server.check()
            raise
    clock.lap("workflow")
    try:
        for name, data in files.items():
            (out / f"{name}.png").write_bytes(data)
    except OSError as error:
        raise Failure(f"The pictures could not be written to {out}: {error.strerror}.") from error
    instruction = next(n["inputs"]["instruction"] for n in prompt.values() if n["class_type"] == "SDAEditEmbedding")
    picture(environment, "sheet", out / "demo.png", instruction, *(out / f"{name}.png" for name in files))
    clock.lap("sheet")
    say(f"Done in {clock.total():.1f} s: {out / 'demo.png'}")
    if arguments.json:
        paths = {name: str(out / f"{name}.png") for name in (*files, "demo")}
        say(json.dumps({**paths, "instruction": instruction, "seed": arguments.seed, "seconds": clock.laps}))
    return 0


def picture(environment: Environment, action: str, *arguments: object) -> None:
    script = ROOT / "runner" / "picture.py"
    command = [str(environment.python), str(script), action, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Failure(f"The picture work failed: {reason.rstrip('.')}.")


class Clock:
    """Seconds per phase, in the order of the phases."""

    def __init__(self) -> None:
        self.began = self.last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self.last, 2)
        self.last = now

    def total(self) -> float:
        self.laps["total"] = round(time.monotonic() - self.began, 2)
        return self.laps["total"]


class Progress:
    """One line per node; on a terminal the sampling steps count up in place."""

    def __init__(self, prompt: dict) -> None:
        self.names = {key: node["class_type"] for key, node in prompt.items()}

    def __call__(self, node: str, value: int, maximum: int) -> None:
        if maximum and (sys.stdout.isatty() or value == maximum):
            bar = "#" * round(24 * value / maximum)
            end = "\n" if value == maximum else ""
            print(f"\r  {self.names.get(node, node):26} [{bar:24}] {value}/{maximum}", end=end, flush=True)


def inside(name: str, arguments: list[str], needs: tuple[str, ...] = ()) -> int:
    """Runs a module in the environment, with ComfyUI's place in COMFYUI_PATH; its exit code is ours."""
    environment = prepare(needs)
    variables = {**os.environ, "COMFYUI_PATH": str(environment.comfyui), "COMFYUI_PYTHON": str(environment.python)}
    # A group of its own: whoever ends run.py, a key or a `kill`, the child hears of it once, from here.
    alone = os.name != "nt"
    process = subprocess.Popen(module(environment.python, name, arguments), env=variables, start_new_session=alone)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the child ends in its own way, with its ComfyUI
            if alone:  # on Windows the key has reached it too
                process.send_signal(signal.SIGINT)


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("demo", help="encode, edit and repaint a picture in a real ComfyUI")
    show.add_argument("--image", type=Path, help="your picture (default: a bundled scene the miniature never saw)")
    show.add_argument("--instruction", help="what to change (default: the one in the workflow)")
    show.add_argument("--seed", type=int, default=0, help="noise seed (default: 0)")
    show.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    show.add_argument("--port", type=int, help="ComfyUI's port (default: any free one)")
    show.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    for name, text in (("test", "all tests"), ("eval", "measure the miniature"), ("bench", "run a benchmark")):
        commands.add_parser(name, help=text, add_help=False)
    # Only the command is parsed here for the passing-on ones: what follows it belongs to the other program.
    command, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    arguments = parser.parse_args(sys.argv[1:2] if command in ("test", "eval", "bench") else None)
    say(f"Semantic Diffusion Adapter: {command}")
    if command == "test":
        # In three processes, for two cores: much of the time is waiting, for a browser, a server, a process that starts.
        # One thread in each: threads that wait for one another would spin on the cores that the others need.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        return inside("pytest", ["-c", str(ROOT / "pyproject.toml"), "-n", "3", *rest],
                      ("pytest", "xdist", "hypothesis", "diffusers"))
    if command == "eval":
        return inside(f"{PACKAGE}.training.miniature.evaluate", rest, ("diffusers", "scipy", "tensorboard", "tqdm"))
    if command == "bench":
        names = sorted(p.stem for p in (ROOT / "benchmarks").glob("[a-z]*.py"))
        if not rest or rest[0] not in names:
            raise Failure(f"Name one of these benchmarks: {', '.join(names)}.")
        needs = {"attention": (), "data": ("diffusers", "fsspec", "pyarrow", "tqdm")}.get(
            rest[0], ("diffusers", "scipy", "tensorboard", "tqdm", "tyro"))
        return inside(f"{PACKAGE}.benchmarks.{rest[0]}", rest[1:], needs)
    return demo(arguments)


def listen() -> None:
    """Let Ctrl-C, `kill` and a closed terminal end a run alike, with all that it has started.

    SIGINT is set too: what starts under nohup or in the background inherits it as ignored. SIGHUP stays as nohup left it.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, signal.default_int_handler)


if __name__ == "__main__":
    listen()
    try:
        sys.exit(main())
    except Failure as failure:
        print(f"\n{failure}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # no disk space, no permission
        print(f"\n{error.strerror or error}: {error.filename or 'a file could not be written'}.", file=sys.stderr)
        sys.exit(2)
