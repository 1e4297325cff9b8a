"""`run.py demo` as a person starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from semantic_diffusion_adapter.runner.environment import STAMP

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parents[2]
DEMO = [sys.executable, str(ROOT / "run.py"), "demo"]


@pytest.fixture(autouse=True)
def comfyui_is_here() -> None:
    if not os.environ.get("COMFYUI_PATH") and not STAMP.exists():
        pytest.skip("no ComfyUI here; `python3 run.py test` makes one")


def refused(*arguments: str) -> str:
    """The one sentence that a wrong command gets."""
    done = subprocess.run([*DEMO, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].endswith("."), lines
    return lines[0]


def test_a_wrong_path_is_named(tmp_path: Path) -> None:
    assert "no/such.png" in refused("--image", "no/such.png", "--out", str(tmp_path))


def test_an_unreadable_picture_is_named(miniature: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    assert "text.png" in refused("--image", str(tmp_path / "text.png"), "--out", str(tmp_path / "out"))


def test_an_out_folder_that_cannot_be_is_named(miniature: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused("--out", str(tmp_path / "file" / "out"))


def test_a_port_in_use_is_named(miniature: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"Port {port} is in use" in refused("--port", port, "--out", str(tmp_path))


def test_the_demo_writes_its_pictures(miniature: Path, tmp_path: Path) -> None:
    arguments = ["--json", "--seed", "4", "--instruction", "remove everything red", "--out", str(tmp_path)]
    done = subprocess.run([*DEMO, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["instruction"], result["seed"]) == ("remove everything red", 4)
    for name in ("source", "reconstruction", "edited"):
        assert Image.open(result[name]).size == (128, 128)
    assert Image.open(result["demo"]).width > 3 * 128
    phases = result["seconds"]
    assert phases["total"] >= sum(value for name, value in phases.items() if name != "total") - 0.1


def ignore_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.skipif(os.name == "nt", reason="a test cannot press Ctrl-C on Windows")
def test_ctrl_c_leaves_no_server_behind(miniature: Path, tmp_path: Path) -> None:
    """Nor where SIGINT was ignored at the start, as under nohup or in the background."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    demo = subprocess.Popen([*DEMO, "--out", str(tmp_path)], preexec_fn=ignore_ctrl_c, **pipes)
    port = next(int(found[1]) for line in demo.stdout if (found := re.search(r"http://127\.0\.0\.1:(\d+)", line)))
    demo.send_signal(signal.SIGINT)
    assert demo.wait(30) == 130
    time.sleep(0.5)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
