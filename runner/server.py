"""Starts a headless ComfyUI with this pack, in folders of its own, and takes it down again whatever happens."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from .environment import ROOT, Environment, Failure

PACK = "semantic-diffusion-adapter"  # the pack's folder name in custom_nodes, and so in the template browser
START_SECONDS = 300
# Ends a ComfyUI whose starter is killed: then the pipe to this closes without a word.
WATCH = """
import os, signal, sys
if not sys.stdin.buffer.read(1):
    pid = int(sys.argv[1])
    os.killpg(pid, signal.SIGKILL) if hasattr(os, "killpg") else os.kill(pid, signal.SIGTERM)
"""


@contextlib.contextmanager
def serve(environment: Environment, port: int | None = None, report: Callable[[str], None] = print) -> Iterator[Server]:
    """A running ComfyUI; models, inputs, outputs, settings and database live in a temporary folder.

    The pack is linked, not copied, into that folder's custom_nodes: no other pack is loaded, and nothing of a user's
    own ComfyUI is read or written. Raises Failure when the port is taken or ComfyUI does not come up.
    """
    port = _port(port)
    base = Path(tempfile.mkdtemp(prefix="sda-"))
    server = None
    try:
        for folder in ("custom_nodes", "models", "input", "output", "user"):
            (base / folder).mkdir()
        _link(base / "custom_nodes" / PACK)
        command = [
            *(str(environment.python), "-s", str(environment.comfyui / "main.py")),
            *("--base-directory", str(base), "--user-directory", str(base / "user")),
            *("--database-url", "sqlite:///:memory:", "--listen", "127.0.0.1", "--port", str(port)),
            *("--disable-auto-launch", "--disable-api-nodes", *_device(environment)),
        ]
        server = Server(command, base, port)
        server.wait(report)
        yield server
    finally:
        if server:
            server.stop()
        _unlink(base / "custom_nodes" / PACK)
        shutil.rmtree(base, ignore_errors=True)


class Server:
    def __init__(self, command: list[str], base: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.base = base
        self.log = base / "comfyui.log"
        # A group of its own: Ctrl-C reaches only run.py, which then ends ComfyUI with everything it started.
        group = {"creationflags": 0x200} if os.name == "nt" else {"start_new_session": True}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=base, **group
            )
        watch = [sys.executable, "-c", WATCH, str(self.process.pid)]
        self.watch = subprocess.Popen(watch, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, **group)

    def wait(self, report: Callable[[str], None]) -> None:
        began = time.monotonic()
        while time.monotonic() - began < START_SECONDS:
            self.check()
            try:
                urllib.request.urlopen(self.url + "/system_stats", timeout=5).read()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        else:
            raise Failure(f"ComfyUI did not answer within {START_SECONDS} s; its last lines:\n{self.tail()}")
        if "(IMPORT FAILED)" in self.log.read_text(errors="replace"):
            raise Failure(f"ComfyUI could not load the pack; its last lines:\n{self.tail(40)}")
        report(f"ComfyUI answers at {self.url} after {time.monotonic() - began:.1f} s")

    def check(self) -> None:
        """Raises Failure when ComfyUI has ended."""
        if self.process.poll() is not None:
            raise Failure(f"ComfyUI ended with code {self.process.returncode}; its last lines:\n{self.tail()}")

    def tail(self, lines: int = 12) -> str:
        return "\n".join("  " + line for line in self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.watch.communicate(b".")
        if self.process.poll() is not None:
            return
        if os.name == "nt":
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(self.process.pid)], capture_output=True)
        else:
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            if os.name != "nt":
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _port(wanted: int | None) -> int:
    with socket.socket() as probe:
        if os.name != "nt":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except (OSError, OverflowError) as error:
            raise Failure(f"Port {wanted} is in use or not allowed; give another --port or leave it out.") from error
        return probe.getsockname()[1]


def _device(environment: Environment) -> list[str]:
    """`--cpu` unless PyTorch itself finds CUDA; the question takes seconds, and is asked only where a driver is."""
    if not (shutil.which("nvidia-smi") or os.path.exists("/dev/kfd")):
        return ["--cpu"]
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    answer = subprocess.run([str(environment.python), "-c", question], capture_output=True)
    return ["--cpu"] if answer.returncode else []


def _link(link: Path) -> None:
    try:
        link.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        if os.name != "nt":
            raise
        # Without developer mode Windows refuses symbolic links, but not junctions.
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(ROOT)], check=True, capture_output=True)


def _unlink(link: Path) -> None:
    """Removes the link itself, first: no clean-up may ever walk through it into the repository."""
    with contextlib.suppress(FileNotFoundError):
        link.unlink() if link.is_symlink() else link.rmdir()
