"""The files of one kind below a folder. Only what has changed is looked at again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePath

# A folder or a file that changed this short a time before it was read may change once more at the same stamp, or is
# just being written.
YOUNG = 2_000_000_000  # nanoseconds


@dataclass(frozen=True)
class Listing:
    """What a folder holds itself: its subfolders and its files of the kind."""

    changed: int  # the folder's own time in nanoseconds, which adding, renaming and deleting move
    settled: bool  # nothing in it was young
    folders: tuple[str, ...]
    files: tuple[str, ...]


class Walk:
    """suffix: the ending of the files to look at.
    wanted: whether the file at a path is of the kind, asked once for each state of a file."""

    def __init__(self, suffix: str, wanted: Callable[[str], bool]):
        self.suffix = suffix
        self.known: dict[str, Listing] = {}
        self.wanted = lru_cache(maxsize=100_000)(lambda path, size, changed: wanted(path))

    def below(self, folder: str) -> list[str]:
        """The wanted files below a folder by their paths from there, with `/`. Links are followed, not in circles."""
        found, seen, waiting = [], set(), [folder]
        while waiting:
            place = waiting.pop()
            try:
                state = os.stat(place)
                if (state.st_dev, state.st_ino) in seen:  # a link back to a folder above
                    continue
                listing = self._list(place, state.st_mtime_ns)
            except OSError:  # gone meanwhile, or not for us to read
                continue
            seen.add((state.st_dev, state.st_ino))
            waiting += listing.folders
            found += listing.files
        return sorted(PurePath(path).relative_to(folder).as_posix() for path in found)

    def _list(self, folder: str, changed: int) -> Listing:
        known = self.known.get(folder)
        if known is not None and known.settled and known.changed == changed:
            return known
        now, newest = time.time_ns(), changed
        folders, files = [], []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.path)
                elif entry.name.endswith(self.suffix) and entry.is_file():
                    state = entry.stat()
                    newest = max(newest, state.st_mtime_ns)
                    if self.wanted(entry.path, state.st_size, state.st_mtime_ns):
                        files.append(entry.path)
        self.known[folder] = Listing(changed, now - newest > YOUNG, tuple(folders), tuple(files))
        return self.known[folder]
