"""Files that appear whole or not at all, and what a killed process leaves behind."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_OURS = re.compile(r"\.sda-([0-9a-f]{8})-(\d+)-\w+\.tmp")
_OLD = 24 * 3600  # seconds: nobody writes one file for a day


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to. When the block ends without an error, one rename makes the file there `target`.

    The path lies in a hidden folder beside the target. That folder is removed when the block ends; where the process
    was killed, the next save beside it removes it (`sweep`). The file gets the permissions that a plain `open` would
    give. OSError where it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    room = Path(tempfile.mkdtemp(prefix=f".sda-{_host()}-{os.getpid()}-", suffix=".tmp", dir=target.parent))
    try:
        (room / "mode").touch(0o666)
        mode = stat.S_IMODE((room / "mode").stat().st_mode)
        yield room / "file"
        # Some writers make files that only their owner can read; a server often runs as someone else.
        os.chmod(room / "file", mode)
        os.replace(room / "file", target)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete what killed saves left in a folder.

    These are folders of our naming whose process is gone, or that are a day old.
    """
    with contextlib.suppress(OSError):
        for found in list(os.scandir(folder)):
            named = _OURS.fullmatch(found.name)
            if named and found.is_dir(follow_symlinks=False) and _abandoned(found, named[1], int(named[2])):
                shutil.rmtree(found.path, ignore_errors=True)


def _abandoned(found: os.DirEntry, host: str, process: int) -> bool:
    if time.time() - found.stat(follow_symlinks=False).st_mtime > _OLD:
        return True
    if (
        host != _host() or os.name == "nt"
    ):  # another machine's process; on Windows os.kill would end the one that is asked
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass  # it runs, as someone else
    return False


def _host() -> str:
    return hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
