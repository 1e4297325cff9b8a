"""A file appears whole or not at all, as readable as any other, and what a killed save leaves goes at the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from semantic_diffusion_adapter.kernels.replace import replacing, sweep

KILLED = """
import sys, time
from pathlib import Path
from semantic_diffusion_adapter.kernels.replace import replacing
with replacing(Path(sys.argv[1])) as path:
    path.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_or_left(tmp_path):
    target = tmp_path / "deep" / "a"
    for text in (b"one", b"two"):
        with replacing(target) as path:
            path.write_bytes(text)
        assert target.read_bytes() == text and names(target.parent) == ["a"]
    with pytest.raises(RuntimeError), replacing(target) as path:
        path.write_bytes(b"three")
        raise RuntimeError
    assert target.read_bytes() == b"two" and names(target.parent) == ["a"]


def test_a_name_as_long_as_the_system_takes(tmp_path):
    with replacing(tmp_path / ("a" * 255)) as path:
        path.write_bytes(b"x")
    assert names(tmp_path) == ["a" * 255]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_permissions_are_those_of_a_plain_open_and_the_mask_is_not_touched(tmp_path, mask):
    """In a process of its own: the mask belongs to the whole process."""
    script = (
        "import os, sys; from pathlib import Path; from semantic_diffusion_adapter.kernels.replace import replacing\n"
        "os.umask(int(sys.argv[2])); os.umask = None\n"
        "with replacing(Path(sys.argv[1])) as path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a"), str(mask)], check=True)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.skipif(os.name == "nt", reason="on Windows only age tells")
def test_what_a_killed_save_left_goes_at_the_next_one(tmp_path):
    saving = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    saving.stdout.readline()
    left = names(tmp_path)
    assert len(left) == 1 and left[0].startswith(".sda-")
    sweep(tmp_path)
    assert names(tmp_path) == left, "it is still being written"
    saving.send_signal(signal.SIGKILL)
    saving.wait()
    with replacing(tmp_path / "b") as path:
        path.write_bytes(b"x")
    assert names(tmp_path) == ["b"]


def test_only_what_is_ours_and_abandoned_is_swept(tmp_path):
    other, today = f".sda-00000000-{os.getpid()}-new.tmp", f".sda-00000000-{2**30}-x.tmp"
    strange = (".tmpab12", ".sda-x.tmp", "sda-00000000-1-x.tmp", ".sda-00000000-1-x.tmp.keep")
    for name in (other, today, *strange):
        (tmp_path / name).mkdir()
    (tmp_path / f".sda-00000000-{2**30}-file.tmp").write_bytes(b"a file is not ours")
    sweep(tmp_path)
    assert {other, today, *strange} <= set(names(tmp_path)), "another machine's are left for a day"
    old = time.time() - 2 * 24 * 3600
    for name in names(tmp_path):
        os.utime(tmp_path / name, (old, old))
    sweep(tmp_path)
    assert names(tmp_path) == sorted((*strange, f".sda-00000000-{2**30}-file.tmp"))
