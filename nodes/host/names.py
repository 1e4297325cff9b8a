"""File names that every system can store and every page can show, so that an embedding can be shared."""

from __future__ import annotations

import re
import unicodedata
from pathlib import PureWindowsPath

LONGEST = 200  # bytes of UTF-8: file systems take 255 to a name, and core's number and the ending come to it
SHOWN = 60  # letters of a name in a sentence
# Those that Windows keeps for itself; a page of ComfyUI may take the first two for HTML.
_SIGNS = re.compile(r'[<>:"|?*]')
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])", re.IGNORECASE)


def leads_out(name: str) -> bool:
    """Whether a relative name leaves its folder, by the rules of any system: it has a drive, a root or `..`."""
    path = PureWindowsPath(name)  # knows both slashes and drives
    return bool(path.anchor) or ".." in path.parts


def fault(name: str) -> str | None:
    """Why this path (parts divided by either slash) cannot be stored everywhere, and the remedy; None if it can."""
    for part in re.split(r"[/\\]", name):
        if not part.strip(". "):
            if part not in ("", "."):
                return "has a part of nothing but dots and spaces: give it letters"
        elif any(unicodedata.category(sign) in ("Cc", "Cs") for sign in part):
            return "has a character that cannot be seen: type it again"
        elif sign := _SIGNS.search(part):
            return f"has the sign {sign[0]}, which Windows cannot store in a name: leave it out"
        elif _DEVICES.fullmatch(part.split(".")[0].rstrip()):
            return f"has {part!r}, which Windows keeps for a device: choose another word"
        elif len(part.encode()) > LONGEST:
            return f"is too long ({len(part.encode())} bytes): shorten it to {LONGEST}"
    return None


def shown(name: str) -> str:
    """A name as a sentence quotes it: on one line, the middle of a long one left out."""
    return repr(name if len(name) <= SHOWN else f"{name[: SHOWN // 2]}…{name[-SHOWN // 2 :]}")
